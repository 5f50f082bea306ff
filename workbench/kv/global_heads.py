"""Room for all heads by one threshold over the scores of all layers and heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.kv.adaptive_heads import adding_up
from workbench.kv.base import KVMethod
from workbench.kv.ranking import Ranking
from workbench.registry import param


class GlobalHeads(KVMethod):
    """Share the room by one threshold over the scores of all layers and heads; every head keeps at least one.

    A base class, so that the threshold yields to an allocator of the recipe.
    """

    head_adaptive = True

    heads: Literal["global", "equal"] = param(
        "global", help="one threshold over all layers and heads, or the same room for each head"
    )

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        if self.heads == "equal":
            return super().allocate(ranking, entries)

        def counts(taken: Tensor) -> Tensor:  # [1] best entries of all -> how many are each head's, [1, l * k]
            limits = taken.to(ranking.in_all.dtype).expand(ranking.layers, ranking.kv_heads)[..., None].contiguous()
            return torch.searchsorted(ranking.in_all, limits).view(1, -1).clamp_min(1)

        # What every head keeps at least counts too: where it was not among the best, fewer of them are taken.
        total = torch.tensor([min(entries, ranking.scores.numel())])
        return adding_up(counts, total).view(ranking.layers, ranking.kv_heads)
