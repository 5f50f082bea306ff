"""A linear layer of sparse weights for a few tokens, whose weights are never in memory with their zeros."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import FEW, WIDEST_SPARSE
from workbench_kernels.weight import sparse_weight


def fits(x: Tensor) -> bool:
    """Whether the kernel takes these inputs: a few tokens, summed in float32."""
    return 1 <= x.shape[0] <= FEW and 1 <= x.shape[1] <= WIDEST_SPARSE and x.dtype.itemsize <= 4


def _takes(x: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor | None) -> bool:
    return on_gpu(x, bitmap, values, starts) and fits(x)


@with_kernel("gpu.sparse_linear:sparse_linear", when=_takes)
def sparse_linear(x: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor | None) -> Tensor:
    """x [n, i] times the transpose of the weight [o, i] of which only `values` are held: [n, o] in the dtype of x.

    bitmap, values, starts: see `workbench_kernels.weight.sparse_weight`.
    The reference computes in float32, or float64 where given that.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(exact), sparse_weight.reference(bitmap, values, starts, x.shape[1], exact)).to(x.dtype)
