"""A linear layer of sparse weights for a few tokens, whose weights are never in memory with their zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from workbench_kernels.dispatch import on_gpu
from workbench_kernels.weight import WIDEST, sparse_weight_reference

FEW = 4  # tokens, for each of which all weights are multiplied number by number


def sparse_linear(x: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor | None) -> Tensor:
    """x [n, i] times the transpose of the weight [o, i] of which only `values` are held: [n, o] in the dtype of x.

    bitmap, values, starts: see `workbench_kernels.weight.sparse_weight`.
    """
    if on_gpu(x, bitmap, values, starts) and fits(x):
        from workbench_kernels.gpu.sparse_linear import sparse_linear as kernel

        return kernel(x, bitmap, values, starts)
    return sparse_linear_reference(x, bitmap, values, starts)


def fits(x: Tensor) -> bool:
    """Whether the kernel takes these inputs: a few tokens, summed in float32."""
    return 1 <= x.shape[0] <= FEW and 1 <= x.shape[1] <= WIDEST and x.dtype.itemsize <= 4


def sparse_linear_reference(x: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor | None) -> Tensor:
    """The same in plain PyTorch: computed in float32, or float64 where given that."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(exact), sparse_weight_reference(bitmap, values, starts, x.shape[1], exact)).to(x.dtype)
