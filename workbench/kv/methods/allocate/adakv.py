"""AdaKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.bisection import largest_each
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Paper, param, register


@register
class AdaKV(SnapKV):
    """Give more room to the heads of a layer that spread their attention, less to those that concentrate it.

    Every layer has the same room. Each head is certain of a `safeguard` share of an equal split; the rest goes to the
    best scores over all heads of the layer (algorithm 1). Scores are SnapKV's, or those of any other method in the
    recipe.
    """

    key = "adakv"
    title = "AdaKV"
    paper = Paper(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        "Feng et al. 2024",
        "2407.11550",
    )
    claim = "better quality than an equal split at the same size"
    default_budget = 0.5
    head_adaptive = True

    safeguard: float = param(0.2, ge=0, le=1, help="share of an equal split that every head is certain of")

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        heads = ranking.kv_heads
        total = min(max(entries // ranking.layers, heads), heads * ranking.tokens)  # of a layer
        certain = max(int(self.safeguard * (total // heads)), 1)

        def counts(taken: Tensor) -> Tensor:  # [l] best entries of a layer taken -> [l, k] of each head
            limits = taken[:, None, None].expand(-1, heads, 1).contiguous()
            return torch.searchsorted(ranking.in_layer, limits)[..., 0].clamp_min(certain)

        # What is certain counts against the total: the larger it is, the fewer of the layer's best are taken.
        none = torch.zeros(ranking.layers, dtype=torch.int64, device=ranking.in_layer.device)
        beyond = heads * ranking.tokens + 1
        return counts(largest_each(lambda taken: counts(taken).sum(dim=1) <= total, none, beyond))
