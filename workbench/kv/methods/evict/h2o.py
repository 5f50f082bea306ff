"""H2O."""

from __future__ import annotations

from torch import Tensor

from workbench.kv.accumulated_attention import AccumulatedAttention, heavy_or_recent
from workbench.kv.stores.mixed import weakest
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


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
    fidelity = Fidelity("deviates", "a recent heavy hitter counts once, so both halves reach a little further")
    presets = (
        Preset("code", "FMInference/H2O, h2o_hf/scripts/lm_eval/h2o.sh, ac75c2a", recent_share=0.5, decode=True),
    )
    default_budget = 0.5

    recent_share: float = param(0.5, ge=0, le=1, help="part of the kept positions that are simply the last ones")
    decode: bool = param(True, help="also evict while decoding, so that the cache never grows")

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    def score(self, layer: LayerTrace) -> Tensor:
        return heavy_or_recent(super().score(layer), self.recent_share)

    def eviction_state(self, layer: LayerTrace) -> Tensor:
        return layer.received()

    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        return state + weights.sum(dim=(1, 2))

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        return weakest(state, positions, room, self.recent_share)
