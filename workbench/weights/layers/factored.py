"""Linear layers as two layers, each of which may be held in a form of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.measure.memory import tensor_bytes
from workbench.weights.layers.compact import CompactLinear, Description


class FactoredLinear(CompactLinear):
    """A linear layer whose weight [o, i] is that of `up` [o, r] times that of `down` [r, i]: two layers without a bias,
    plain or small.
    """

    down: nn.Linear | CompactLinear
    up: nn.Linear | CompactLinear

    def __init__(
        self, down: nn.Linear | CompactLinear, up: nn.Linear | CompactLinear, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(down.in_features, up.out_features, bias)
        self.down, self.up = down, up

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def nbytes(self) -> int:
        return tensor_bytes([*self.down.parameters(), *self.up.parameters(), *self.buffers()])

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return _rows(self.up, first, last, dtype) @ _rows(self.down, 0, self.rank, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out if self.bias is None else out + self.bias

    def describe(self) -> Description:
        return {**super().describe(), "rank": self.rank}


def _rows(layer: nn.Linear | CompactLinear, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, CompactLinear):
        return layer.rows(first, last, dtype)
    return layer.weight[first:last].to(dtype)
