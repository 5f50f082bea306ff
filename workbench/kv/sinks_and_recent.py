"""The first tokens, where attention sinks, and the most recent ones: the window that several methods begin with."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.registry import param
from workbench.trace import LayerTrace


class SinksAndRecent(KVMethod):
    """Score the first tokens highest, then by recency. A base class, for methods that add something to this window."""

    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")

    def score(self, layer: LayerTrace) -> Tensor:
        age = torch.arange(layer.tokens, device=layer.device)
        rank = torch.where(age < self.sinks, 2 * layer.tokens - age, age)  # the first sink is the last to go
        return rank.float().expand(layer.kv_heads, -1)
