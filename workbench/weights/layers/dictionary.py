"""Linear layers as a few atoms of a dictionary for each output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.precision import half, sixteen
from workbench.weights.layers.compact import CompactLinear, Description
from workbench_kernels.packing import pack
from workbench_kernels.weight import sparse_weight


class DictionaryLinear(CompactLinear):
    """A linear layer whose weight [o, i] is a sparse matrix [o, a] times a dictionary [a, i].

    atoms: 16 bits [a, i]. mask: uint8 [o, ceil(a / 8)], a bit for each coefficient that is not zero. coefficients:
    float16 [o, s], those of each output by ascending atom.
    """

    atoms: Tensor
    mask: Tensor
    coefficients: Tensor

    def __init__(self, atoms: Tensor, chosen: Tensor, coefficients: Tensor, bias: nn.Parameter | None = None) -> None:
        """chosen: bool [o, a], as many in each row as there are coefficients [o, s]."""
        super().__init__(atoms.shape[1], chosen.shape[0], bias)
        self.register_buffer("atoms", sixteen(atoms, "its atoms"))
        self.register_buffer("mask", pack(chosen.to(torch.uint8), 1).contiguous())
        self.register_buffer("coefficients", half(coefficients, "its coefficients"))

    def codes(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The sparse matrix of some outputs, with its zeros: [last - first, a]."""
        coefficients = self.coefficients[first:last].flatten()
        return sparse_weight(self.mask[first:last], coefficients, None, self.atoms.shape[0], dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.codes(first, last, dtype) @ self.atoms.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.atoms.to(x.dtype)), self.codes(0, self.out_features, x.dtype), self.bias)

    def describe(self) -> Description:
        atoms, kept = self.atoms.shape[0], self.coefficients.shape[1]
        return {**super().describe(), "rank": atoms, "coefficients": kept}


def dictionary_nbytes(out_features: int, in_features: int, atoms: int, coefficients: int) -> int:
    """Bytes of a DictionaryLinear."""
    return 2 * atoms * in_features + out_features * (-(-atoms // 8) + 2 * coefficients)
