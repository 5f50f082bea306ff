"""Attention of new tokens over those entries of a store that a method lets them see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.core.partial_softmax import PartialSoftmax, scaled_scores
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised


class VisibleScores(NamedTuple):
    """The entries of a store that some query sees, and their scores; nothing else is multiplied.

    slots int64 [k, c]: where they lie in the store; scores float32 [h, r, c], -inf where a query may not look (and in
    the slots that make heads equally long); values [k, c, dv].
    """

    slots: Tensor
    scores: Tensor
    values: Tensor

    @classmethod
    def of(
        cls, rows: Tensor, contents: Dequantised, seen: Tensor, scoring: Scoring, positions: Tensor
    ) -> VisibleScores:
        """Of float32 queries rows [h, r, d] at positions int [r], scaled already, where seen bool [k, r, m] allows;
        each head sees some entry.
        """
        slots, hidden = visible_slots(seen)
        keys, values = (_at(x, slots) for x in (contents.keys, contents.values))
        offsets = scoring.offsets(positions, contents.positions)
        if offsets is not None:
            offsets = offsets.expand(len(slots), -1).gather(1, slots)
        scores = scaled_scores(rows, keys, scoring, offsets)
        if hidden is not None:
            scores.unflatten(0, (len(keys), -1)).masked_fill_(hidden[:, None], -torch.inf)
        return cls(slots, scores, values)

    def softmax(self) -> PartialSoftmax:
        """The attention over them. The scores are overwritten."""
        return PartialSoftmax.of_scores(self.scores, self.values)


def visible_slots(seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """The slots, ascending, that some query of a KV head sees, int64 [k, c], and where in them a query may not look,
    bool [k, r, c], or None: nowhere. seen: bool [k, r, m].
    """
    some = seen.any(dim=1)  # [k, m]
    counts = some.sum(dim=1)
    most = int(counts.max())
    if most == seen.shape[2]:
        slots = torch.arange(most, device=seen.device).expand(len(seen), -1)
    elif bool((counts == most).all()):
        slots = some.nonzero()[:, 1].view(len(seen), most)
        if seen.shape[1] == 1:
            return slots, None
    else:  # shorter heads end in slots that they do not see
        slots = (~some).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return slots, ~seen.gather(2, slots[:, None].expand(-1, seen.shape[1], -1))


def _at(x: Tensor, slots: Tensor) -> Tensor:
    """x [k, m, d] at slots [k, c]: [k, c, d]."""
    if slots.shape[1] == x.shape[1]:  # all of them, which `visible_slots` gives in order
        return x
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
