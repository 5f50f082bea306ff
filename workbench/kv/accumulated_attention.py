"""The attention that each position received so far, by which several methods score."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.kv.ranking import places
from workbench.trace import LayerTrace


class AccumulatedAttention(KVMethod):
    """Score positions by the attention they received from all queries so far."""

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.received()


def heavy_or_recent(attention: Tensor, recent_share: float) -> Tensor:
    """Scores [k, n] by which a `recent_share` of what is kept are the last positions, the rest heavy hitters.

    attention [k, n]: what each position received. A position's score is the better of its two places, so that one order
    serves every budget.
    """
    heavy = places(attention)  # [k, n], 0 the best
    recent = torch.arange(attention.shape[1] - 1, -1, -1, device=heavy.device).expand_as(heavy)
    return -torch.minimum(heavy / max(1 - recent_share, 1e-6), recent / max(recent_share, 1e-6))
