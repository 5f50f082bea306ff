"""Linear layers as two thin ones, and feed-forward modules that never hold all their activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.precision import sixteen
from workbench.weights.layers.compact import CompactLinear, Description


class LowRankLinear(CompactLinear):
    """A linear layer whose weight [o, i] is up [o, r] times down [r, i], both held at 16 bits."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(down.shape[1], up.shape[0], bias)
        self.register_buffer("down", sixteen(down, "its factors"))
        self.register_buffer("up", sixteen(up.to(down.dtype), "its factors"))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.up[first:last].to(dtype) @ self.down.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), self.bias)

    def describe(self) -> Description:
        return {**super().describe(), "rank": self.rank}
