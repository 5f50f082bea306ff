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

    In two passes over the ids: in the first all see what is before them, in the second a quarter sees only itself, the
    second half of the quarter before it, and the first `sinks`. Nothing is cached but the first pass's keys.
    """
    count = len(ids)
    steps = torch.arange(count, device=device_of(model))
    causal = steps[:, None] >= steps
    size = max(-(-count // _BLOCKS), 1)
    low = steps // size * size - size // 2  # the first position that each query sees in its blocks
    local = causal & ((steps >= low[:, None]) | (steps < sinks))
    progress = progress or Progress()
    full, blocks = (_Seeing(visible, steps, progress) for visible in (causal, local))
    for seeing in (full, blocks):
        forward(model, seeing, ids, steps)
    return {layer: _alike(keys, blocks.keys[layer]) for layer, keys in full.keys.items()}


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """The mean similarity of keys [k, n, d], a span of tokens after another."""
    spans = zip(one.float().split(_SPAN, dim=1), other.float().split(_SPAN, dim=1), strict=True)
    alike = [cosine_similarity(a.flatten(1), b.flatten(1), dim=-1) for a, b in spans]
    return torch.stack(alike).mean().cpu()


@dataclass
class _Seeing:
    """A pass that keeps each layer's keys. visible: bool [n, n]; positions: [n]."""

    visible: Tensor
    positions: Tensor
    progress: Progress
    keys: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self.progress.check()
        self.keys[layer] = key
        visible, positions = self.visible.to(query.device), self.positions.to(query.device)
        begin = scoring.begin(positions[:, None])
        if begin is not None:
            visible = visible & (positions >= begin)
        offsets = scoring.offsets(positions, positions[None])
        return attend(query, key, value, scoring, visible=visible[None], offsets=offsets)[0]
