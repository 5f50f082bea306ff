"""Room for all heads by one threshold over the scores of all layers and heads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.core.bisection import largest
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

        def counts(taken: int) -> Tensor:  # of the `taken` best entries of all, how many are each head's: [l, k]
            limits = torch.full((ranking.layers, ranking.kv_heads, 1), taken, device=ranking.in_all.device)
            return torch.searchsorted(ranking.in_all, limits)[..., 0].clamp_min(1)

        # What every head keeps at least counts too: where it was not among the best, fewer of them are taken.
        return counts(largest(lambda taken: int(counts(taken).sum()) <= entries, 0, ranking.scores.numel() + 1))
