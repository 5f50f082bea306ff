"""Linear layers of which most weights are zero, and only the others are held."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import sixteen
from workbench.weights.layers.compact import CompactLinear, Description
from workbench.weights.layers.marks import marks, starting
from workbench_kernels.dispatch import learning, on_gpu
from workbench_kernels.packing import pack, unpack
from workbench_kernels.sparse_linear import fits, sparse_linear
from workbench_kernels.weight import sparse_weight


class SparseLinear(CompactLinear):
    """A linear layer with the weights [o, i] that are not left out, and one bit a weight that says which those are.

    bitmap: uint8 [o, ceil(i / 8)], packed as `workbench_kernels.packing` does. values: 16 bits [m], row after row, of
    the checkpoint's own type or float16. offsets: int32 [o + 1], where each row's values begin; None where all rows
    hold equally many. The patterns 2:4 and 4:8 need no form of their own: the places of what stays would take two bits
    each, as many as the bitmap.
    """

    bitmap: Tensor
    values: Tensor
    offsets: Tensor | None

    def __init__(self, weight: Tensor, kept: Tensor, bias: nn.Parameter | None = None) -> None:
        """weight: [o, i]; kept: bool [o, i], the weights that are held."""
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("bitmap", pack(kept.to(torch.uint8), 1).contiguous())
        self.register_buffer("values", sixteen(weight[kept], "its weights"))
        counts = kept.sum(dim=1)
        even = bool((counts == counts[0]).all())
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        self.register_buffer("offsets", None if even else ends)
        self.marks = marks(ends)

    @property
    def kept(self) -> Tensor:
        """Which weights are held, bool [o, i]."""
        return unpack(self.bitmap, 1, self.in_features).view(torch.bool)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        if self.offsets is None:
            each = self.values.numel() // self.out_features
            begin, end, starts = first * each, last * each, None
        else:
            begin, end = (starting(self.offsets, self.marks, row) for row in (first, last))
            starts = self.offsets[first : last + 1]
        return sparse_weight(self.bitmap[first:last], self.values[begin:end], starts, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if learning(x) or not fits(flat) or not on_gpu(flat, self.bitmap):
            return super().forward(x)
        out = sparse_linear(flat, self.bitmap, self.values, self.offsets).view(*x.shape[:-1], -1)
        return out if self.bias is None else out.add_(self.bias)

    def describe(self) -> Description:
        return {**super().describe(), "density": self.values.numel() / (self.in_features * self.out_features)}


def sparse_nbytes(out_features: int, in_features: int, kept: int, *, even: bool = False) -> int:
    """Bytes of a SparseLinear that holds `kept` weights; at most, unless `even`: equally many in every row."""
    return out_features * -(-in_features // 8) + 2 * kept + (0 if even else 4 * (out_features + 1))
