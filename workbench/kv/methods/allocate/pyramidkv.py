"""PyramidKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class PyramidKV(SnapKV):
    """SnapKV with more room in the lower layers and less in the higher ones.

    Beyond the window, which every layer keeps, the sizes of the layers fall linearly: the last layer gets its equal
    share divided by `beta`, the first as much more, so that the total is that of equal layers (section 4.2). Where
    the first layers would hold more than the prompt, they hold all of it and the slope is gentler. Budgets that leave
    nothing beyond the window are shared equally.
    """

    key = "pyramidkv"
    title = "PyramidKV"
    paper = Paper(
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        "Cai et al. 2024",
        "2406.02069",
    )
    claim = "12 % of the cache matches all of it on LongBench"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "longbench", "Zefan-Cai/KVCache-Factory, the authors': run_longbench.py and pyramidkv_utils.py, c97f9d7",
            window=8, kernel=7, pooling="max", beta=20,
        ),
        Preset(
            "kvpress", "NVIDIA/kvpress, presses/pyramidkv_press.py, 8bb29b9",
            window=64, kernel=5, pooling="avg", beta=20,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(8, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    beta: int = param(20, ge=1, le=100, help="how steep: the last layer gets its equal share divided by this")

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        total = entries // ranking.kv_heads  # over all layers, for one head
        window = min(self.window, ranking.tokens)
        share = total / ranking.layers - window  # of each layer, beyond the window
        if share <= 0 or ranking.layers == 1:
            return super().allocate(ranking, entries)
        last = share / self.beta
        first = min(2 * share - last, ranking.tokens - window)
        slope = torch.linspace(first, 2 * share - first, ranking.layers, dtype=torch.float64)
        counts = window + slope.floor().long()
        spare = total - int(counts.sum())
        counts[(slope - slope.floor()).topk(spare).indices] += 1
        return counts.clamp_max(ranking.tokens)[:, None].expand(-1, ranking.kv_heads)
