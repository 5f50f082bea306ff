"""H2O, and the accumulated attention that other methods score by too."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.kv.ranking import places
from workbench.kv.stores.mixed import weakest
from workbench.registry import Paper, param, register
from workbench.trace import LayerTrace


class AccumulatedAttention(KVMethod):
    """Score positions by the attention they received from all queries so far."""

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.received()


@register
class H2O(AccumulatedAttention):
    """Keep the heavy hitters, by accumulated attention, and the most recent tokens.

    A `recent_share` of what is kept are the last positions, the rest those with the largest sum of attention received
    (section 4, algorithm 1). A position's score is the better of its two places, so one order serves every budget; a
    recent heavy hitter counts once, and both lists then reach a little further than the paper's halves. While
    decoding, a new token pushes out the entry with the smallest sum that is not recent; sums grow with every step,
    and the cache never outgrows its budget.
    """

    key = "h2o"
    title = "H2O"
    paper = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs", "Zhang et al. 2023", "2306.14048"
    )
    claim = "a budget of 20 % comes near full quality"
    default_budget = 0.5

    recent_share: float = param(0.5, ge=0, le=1, help="part of the kept positions that are simply the last ones")
    decode: bool = param(True, help="also evict while decoding, so that the cache never grows")

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    def score(self, layer: LayerTrace) -> Tensor:
        heavy = places(super().score(layer))  # [k, n], 0 the best
        recent = torch.arange(layer.tokens - 1, -1, -1, device=heavy.device).expand_as(heavy)
        return -torch.minimum(heavy / max(1 - self.recent_share, 1e-6), recent / max(self.recent_share, 1e-6))

    def eviction_state(self, layer: LayerTrace) -> Tensor:
        return layer.received()

    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        return state + weights.sum(dim=(1, 2))

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        return weakest(state, positions, room, self.recent_share)
