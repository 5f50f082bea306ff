"""A linear layer of packed weights for some tokens, whose weights are never in memory at another width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from workbench_kernels.dispatch import on_gpu
from workbench_kernels.packing import unpack

FEW = 4  # tokens that are multiplied number by number, in float32
SOME = 16  # tokens of 16 bits, which the matrix units multiply
RUN = 64  # bytes in a row whose codes share a scale


def packed_linear(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float,
) -> Tensor:  # fmt: skip
    """x [n, i] times the transpose of the weight [o, i] = (code - zero) * scale * columns: [n, o] in the dtype of x.

    plane: uint8 [o, b], codes of 1, 2, 4 or 8 bits as `pack` packs them; scale [o, g], one for `group` neighbouring
    columns; zero [o, g] of any type; None: `middle` everywhere. columns [i]; None: 1.
    """
    given = (x, plane, scale, zero, columns)
    if on_gpu(*given) and fits(x, plane, bits, group):
        if x.shape[0] > FEW:
            from workbench_kernels.gpu.packed_matmul import packed_matmul

            return packed_matmul(*given, bits, group, middle)
        from workbench_kernels.gpu.packed_linear import packed_linear as kernel

        return kernel(*given, bits, group, middle)
    return packed_linear_reference(*given, bits, group, middle)


def fits(x: Tensor, plane: Tensor, bits: int, group: int) -> bool:
    """Whether a kernel takes these: few tokens, summed in float32, and no run of bytes with codes of two groups."""
    most = {2: SOME, 4: FEW}.get(x.dtype.itemsize, 0)
    whole = plane.shape[1] * (8 // bits) == x.shape[1]
    return whole and 1 <= x.shape[0] <= most and plane.shape[1] % RUN == 0 and group % RUN == 0


def packed_linear_reference(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float,
) -> Tensor:  # fmt: skip
    """`packed_linear` in plain PyTorch: computed in float32, or float64 where given that."""
    exact = torch.promote_types(x.dtype, torch.float32)
    inputs = x.shape[1]
    owner = torch.arange(inputs, device=x.device) // group
    codes = unpack(plane, bits, inputs).to(exact)
    below = middle if zero is None else zero.to(exact)[:, owner]
    weight = (codes - below) * scale.to(exact)[:, owner]
    if columns is not None:
        weight *= columns.to(exact)
    return linear(x.to(exact), weight).to(x.dtype)
