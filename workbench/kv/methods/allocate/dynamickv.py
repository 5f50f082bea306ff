"""DynamicKV."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.core.apportion import apportion
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class DynamicKV(SnapKV):
    """Let the task decide how much each layer keeps: as much as it has among the best scores of all layers.

    All layers' scores compete; a layer's room, the same for all its heads, is in proportion to how many of the best it
    has, beyond the window that all keep, and at most `most` times an equal share (algorithm 1). Scores are SnapKV's, or
    those of any other method in the recipe.
    """

    key = "dynamickv"
    title = "DynamicKV"
    paper = Paper(
        "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs", "Zhou et al. 2024", "2412.14838"
    )
    claim = "1.7 % of the cache keeps about 85 % of LongBench quality"
    fidelity = Fidelity("deviates", "layers compete once, after the last, and not every few layers while reading")
    presets = (
        Preset(
            "longbench", "DreamMr/DynamicKV, run_llama3_8b_dynamic_v11.2_max_radio_10.sh and methods/dynamic_v11.py, "
            "8ab3c08", window=8, kernel=7, pooling="avg", most=10.0,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(8, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    pooling: Literal["avg", "max"] = param("avg", help="how neighbouring scores are pooled")
    most: float = param(10.0, ge=1, le=1000, help="times an equal share that a layer gets at most")

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        total, window = entries // ranking.kv_heads, min(self.window, ranking.tokens)
        beyond = min(total, ranking.layers * ranking.tokens) - ranking.layers * window
        if beyond <= 0:
            return super().allocate(ranking, entries)
        best = ranking.in_all < min(entries, ranking.scores.numel())
        among = (best.sum(dim=(1, 2)) - ranking.certain.sum(dim=1)).clamp_min(0)
        cap = min(ranking.tokens - window, max(int(self.most * beyond / ranking.layers), 1))
        counts = window + apportion(beyond, among, torch.full((ranking.layers,), cap))
        return counts[:, None].expand(-1, ranking.kv_heads)
