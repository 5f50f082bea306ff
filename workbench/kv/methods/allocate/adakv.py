"""AdaKV."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from workbench.kv.adaptive_heads import best_and_equal, best_beyond_least
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class AdaKV(SnapKV):
    """Give more room to the heads of a layer that spread their attention, less to those that concentrate it.

    Every layer has the same room. A head gets a `safeguard` share of an equal split, and the rest of what the best
    scores over all heads of the layer would give it (algorithm 1); what stays in any case, SnapKV's window, is no part
    of either. With `floor="least"`, as in kvpress, the safeguard is only the least that a head gets: where the best
    scores give it more, they decide alone. Scores are SnapKV's, or those of any other method in the recipe.
    """

    key = "adakv"
    title = "AdaKV"
    paper = Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        "Feng et al. 2024",
        "2407.11550",
    )
    claim = "better quality than an equal split at the same size"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "longbench", "FFY0/AdaKV, experiments/LongBench/GQA_eval_longbench.sh and snapkv_utils.py, efe4e2e",
            window=32, kernel=7, pooling="max", safeguard=0.2, floor="added",
        ),
        Preset(
            "kvcache-factory", "Zefan-Cai/KVCache-Factory, run_longbench.py, c97f9d7",
            window=8, kernel=7, pooling="max", safeguard=0.2, floor="added",
        ),
        Preset(
            "kvpress", "NVIDIA/kvpress, presses/adakv_press.py and snapkv_press.py, 8bb29b9",
            window=64, kernel=5, pooling="avg", safeguard=0.2, floor="least",
        ),
    )  # fmt: skip
    default_budget = 0.5
    head_adaptive = True

    safeguard: float = param(0.2, ge=0, le=1, help="share of an equal split that every head is certain of")
    floor: Literal["added", "least"] = param("added", help="whether the best scores share out the rest or everything")

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        divide = best_and_equal if self.floor == "added" else best_beyond_least
        return divide(ranking, entries, self.safeguard)
