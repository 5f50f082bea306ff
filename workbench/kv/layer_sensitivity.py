"""How much a layer's keys change when a text is read in blocks, and the room that layers get by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from workbench.core.apportion import apportion
from workbench.engine.attention_hook import device_of, forward
from workbench.progress import Progress
from workbench_kernels import Scoring, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCKS = 4
_SPAN = 100  # tokens whose keys are compared together, as in EpiCache's code


def layer_weights(similarity: Tensor, alpha: float) -> Tensor:
    """What layers' room is in proportion to, from the similarity [l] of their keys: the most sensitive layer 1, the
    least 0.
    """
    spread = similarity.max() - similarity.min()
    return ((similarity.max() - similarity) / spread) ** alpha if float(spread) > 0 else torch.ones_like(similarity)


def layer_counts(room: int, weights: Tensor, entries: Tensor, floor: Tensor) -> Tensor:
    """Entries of each layer, int64 [l]: `room` in proportion to weights, at least `floor` and at most its `entries`."""
    low = torch.zeros_like(entries, dtype=torch.bool)
    while True:
        rest = room - int(floor[low].sum())
        counts = torch.where(low, floor, apportion(rest, weights.masked_fill(low, 0), entries.masked_fill(low, 0)))
        below = counts < floor
        if not bool(below.any()):
            return counts
        low |= below


def key_similarity(
    model: PreTrainedModel, ids: Tensor, sinks: int, progress: Progress | None = None
) -> dict[int, Tensor]:
    """For each layer, the mean cosine similarity of its keys of ids [n] under full causal and block-wise attention.

    In one pass over the ids twice: the first time all see what is before them, the second time a quarter sees only
    itself, the second half of the quarter before it, and the first `sinks`. Nothing is cached.
    """
    count = len(ids)
    steps = torch.arange(count, device=device_of(model))
    causal = steps[:, None] >= steps
    size = max(-(-count // _BLOCKS), 1)
    low = steps // size * size - size // 2  # the first position that each query sees in its blocks
    local = causal & ((steps >= low[:, None]) | (steps < sinks))
    twice = _Twice(torch.block_diag(causal, local).bool(), steps.repeat(2), progress or Progress())
    forward(model, twice, ids.repeat(2), steps.repeat(2))
    return twice.similarity


@dataclass
class _Twice:
    """One pass over the same tokens twice, which do not see each other. visible: bool [2n, 2n]; positions: [2n]."""

    visible: Tensor
    positions: Tensor
    progress: Progress
    similarity: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.check()
        full, local = key.float().chunk(2, dim=1)
        spans = zip(full.split(_SPAN, dim=1), local.split(_SPAN, dim=1), strict=True)
        alike = torch.stack([cosine_similarity(one.flatten(1), other.flatten(1), dim=-1) for one, other in spans])
        self.similarity[layer] = alike.mean().cpu()
        visible = self.visible
        begin = scoring.begin(self.positions[:, None])
        if begin is not None:
            visible = visible & (self.positions >= begin)
        offsets = scoring.offsets(self.positions, self.positions[None])
        return attend(query, key, value, scoring, visible=visible[None], offsets=offsets)[0]
