"""What methods that round weights to a grid of levels have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.registry import param
from workbench.weights.base import WeightMethod
from workbench.weights.layers import (
    CompactLinear,
    PackedLinear,
    SparsePackedLinear,
    packed_nbytes,
    sparse_packed_nbytes,
)
from workbench.weights.layers.masked import kept_of
from workbench.weights.solvers.quantisation_grid import Grid, fit


class Quantiser(WeightMethod):
    """Base of methods whose layers hold `bits` bits a weight, and a 16-bit scale (and a zero) a group of columns.

    The parameters fix the size; a budget is only held against it.
    """

    zero_bytes: ClassVar[int] = 1

    bits: Literal[2, 3, 4, 8] = param(4, help="bits of each weight", own="papers give tables at several bits")
    group_size: int = param(
        64,
        ge=8,
        le=1024,
        multiple_of=8,
        unit="columns",
        help="how many columns share a scale",
        own="papers' 128 does not divide the 576 columns of the default model",
    )
    symmetric: bool = param(
        False,
        help="levels from minus to plus the largest magnitude, without a zero of their own",
        own="off in the code of GPTQ and AWQ; with zeros a grid suits groups that lie to one side",
    )

    def nbytes(self, linear: nn.Linear) -> int:
        zero_bytes, kept = 0 if self.symmetric else self.zero_bytes, kept_of(linear)
        shape, group = (linear.out_features, linear.in_features), self.group(linear)
        if kept is None:
            return packed_nbytes(*shape, self.bits, group, zero_bytes=zero_bytes)
        counts = kept.sum(dim=1)
        even = bool((counts == counts[0]).all())
        return sparse_packed_nbytes(*shape, int(counts.sum()), self.bits, group, zero_bytes=zero_bytes, even=even)

    def group(self, linear: nn.Linear) -> int:
        """Columns that share a scale in this layer: `group_size`, or all of a narrower layer's."""
        return min(self.group_size, linear.in_features)

    def grid(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
        """The grid between the ends of each group of weight [o, i]; a symmetric one uses all of its levels."""
        group = min(self.group_size, weight.shape[1])
        return fit(weight, self.bits, group, symmetric=self.symmetric, every_level=True, shrink=shrink)

    def packed(
        self, codes: Tensor, grid: Grid, bias: nn.Parameter | None, columns: Tensor | None = None
    ) -> PackedLinear:
        """The layer that holds these codes [o, i]."""
        return PackedLinear(codes, grid.scale, self._zeros(grid), self.bits, bias, group=grid.group, columns=columns)

    def held(self, codes: Tensor, grid: Grid, linear: nn.Linear) -> CompactLinear:
        """The layer that holds these codes [o, i] in the place of this one: only those of the weights that stay, where
        some of them were left out before.
        """
        kept = kept_of(linear)
        if kept is None:
            return self.packed(codes, grid, linear.bias)
        return SparsePackedLinear(codes, kept, grid.scale, self._zeros(grid), self.bits, linear.bias, group=grid.group)

    def _zeros(self, grid: Grid) -> Tensor | None:
        return None if self.symmetric else grid.zero.to(torch.uint8)
