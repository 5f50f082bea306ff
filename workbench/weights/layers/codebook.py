"""Linear layers whose outputs share a small codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.precision import sixteen
from workbench.weights.layers.compact import CompactLinear, Description


class CodebookLinear(CompactLinear):
    """A linear layer in which each output's weights are one of a few codewords.

    codewords: 16 bits [c, i]. index: [o], the codeword of each output, int16 where it fits. Inputs are multiplied with
    the codewords only; outputs with the same codeword get the same number.
    """

    codewords: Tensor
    index: Tensor

    def __init__(self, codewords: Tensor, index: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(codewords.shape[1], index.numel(), bias)
        self.register_buffer("codewords", sixteen(codewords, "its codewords"))
        self.register_buffer("index", index.to(_index_dtype(codewords.shape[0]), copy=True).contiguous())

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.codewords[self.index[first:last].long()].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.codewords.to(x.dtype)).index_select(-1, self.index.int())
        return out if self.bias is None else out + self.bias

    def describe(self) -> Description:
        return {**super().describe(), "codewords": self.codewords.shape[0]}


def codebook_nbytes(out_features: int, in_features: int, codewords: int) -> int:
    """Bytes of a CodebookLinear."""
    return 2 * codewords * in_features + out_features * _index_dtype(codewords).itemsize


def _index_dtype(codewords: int) -> torch.dtype:
    return torch.int16 if codewords <= 2**15 else torch.int32
