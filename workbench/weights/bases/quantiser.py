"""What methods that round weights to a grid of levels have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.registry import param
from workbench.weights.base import WeightMethod
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.solvers.quantisation_grid import Grid, fit


class Quantiser(WeightMethod):
    """Base of methods whose layers hold `bits` bits a weight, and a 16-bit scale (and a zero) a group of columns.

    The parameters fix the size; a budget is only held against it.
    """

    zero_bytes: ClassVar[int] = 1

    bits: Literal[2, 3, 4, 8] = param(4, help="bits of each weight")
    group_size: int = param(64, ge=8, le=1024, multiple_of=8, unit="columns", help="how many columns share a scale")
    symmetric: bool = param(False, help="levels from minus to plus the largest magnitude, without a zero of their own")

    def nbytes(self, linear: nn.Linear) -> int:
        zero_bytes = 0 if self.symmetric else self.zero_bytes
        return packed_nbytes(
            linear.out_features, linear.in_features, self.bits, self.group(linear), zero_bytes=zero_bytes
        )

    def group(self, linear: nn.Linear) -> int:
        """Columns that share a scale in this layer: `group_size`, or all of a narrower layer's."""
        return min(self.group_size, linear.in_features)

    def grid(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
        """The grid between the ends of each group of weight [o, i]."""
        return fit(weight, self.bits, min(self.group_size, weight.shape[1]), symmetric=self.symmetric, shrink=shrink)

    def packed(
        self, codes: Tensor, grid: Grid, bias: nn.Parameter | None, columns: Tensor | None = None
    ) -> PackedLinear:
        """The layer that holds these codes [o, i]."""
        zero = None if self.symmetric else grid.zero.to(torch.uint8)
        return PackedLinear(codes, grid.scale, zero, self.bits, bias, group=grid.group, columns=columns)
