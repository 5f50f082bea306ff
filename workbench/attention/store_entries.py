"""Attention of new tokens over those entries of a store that a method lets them see."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.core.partial_softmax import Part
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Contents


class Seen(NamedTuple):
    """The entries of a store that some query sees, and their scores; nothing else is multiplied.

    slots int64 [k, c]: where they lie in the store; scores float32 [h, r, c], -inf where a query may not look (and in
    the slots that make heads equally long); values [k, c, dv].
    """

    slots: Tensor
    scores: Tensor
    values: Tensor

    @classmethod
    def of(cls, rows: Tensor, held: Contents, seen: Tensor, scoring: Scoring) -> Seen:
        """Of float32 queries rows [h, r, d], scaled already, where seen bool [k, r, m] allows; each head sees some entry."""
        heads, number = len(held.keys), rows.shape[1]
        slots, hidden = slots_of(seen)
        keys, values = (_at(x, slots) for x in (held.keys, held.values))
        scores = torch.bmm(rows.reshape(heads, -1, rows.shape[-1]), keys.float().transpose(1, 2))  # [k, g * r, c]
        scores = scoring.cap(scores)
        if hidden is not None:
            scores.unflatten(1, (-1, number)).masked_fill_(hidden[:, None], -torch.inf)
        return cls(slots, scores.view(len(rows), number, -1), values)

    def part(self) -> Part:
        """The attention over them. The scores are overwritten."""
        return Part.weighing(self.scores, self.values)


def slots_of(seen: Tensor) -> tuple[Tensor, Tensor | None]:
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
    if slots.shape[1] == x.shape[1]:  # all of them, which `slots_of` gives in order
        return x
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))
