"""Linear layers, or some columns of them, at 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.precision import sixteen
from workbench.weights.layers.compact import CompactLinear


class DenseLinear(CompactLinear):
    """A linear layer with its weight [o, i] at 16 bits: bfloat16 if it comes so, else float16."""

    weight: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", sixteen(weight, "its weights"))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:last].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), self.bias)
