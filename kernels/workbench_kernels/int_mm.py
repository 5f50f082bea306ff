"""The product of int8 matrices by a GPU's integer units, through PyTorch, and the shapes that they take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [n, i] times weight int8 [o, i] transposed: int32 [n, o], for shapes that lack nothing."""
    return torch._int_mm(x, weight.T)  # noqa: SLF001  # the only way that torch has to its integer units


def missing(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """How many rows of x and of the weight, and columns, integer units lack: more than 16 rows, and multiples of 8."""
    return max(24 - x.shape[0], -x.shape[0] % 8), -weight.shape[0] % 8, -x.shape[1] % 8


def widened(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with so many more rows and columns of zeros, and itself where it needs none."""
    return pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()
