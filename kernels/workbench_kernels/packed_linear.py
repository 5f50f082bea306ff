"""A linear layer of packed weights for some tokens, whose weights are never in memory at another width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import FEW, RUN, SOME
from workbench_kernels.packing import unpack


def fits(x: Tensor, plane: Tensor, bits: int, group: int) -> bool:
    """Whether a kernel takes these: few tokens, summed in float32, and no run of bytes with codes of two groups."""
    most = {2: SOME, 4: FEW}.get(x.dtype.itemsize, 0)
    whole = plane.shape[1] * (8 // bits) == x.shape[1]
    return whole and 1 <= x.shape[0] <= most and plane.shape[1] % RUN == 0 and group % RUN == 0


def _takes(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int
) -> bool:
    return on_gpu(x, plane, scale, zero, columns) and fits(x, plane, bits, group)


def _takes_few(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int
) -> bool:
    return x.shape[0] <= FEW and _takes(x, plane, scale, zero, columns, bits, group)


@with_kernel("gpu.packed_linear:packed_linear", when=_takes_few)
@with_kernel("gpu.packed_matmul:packed_matmul", when=_takes)
def packed_linear(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float,
) -> Tensor:  # fmt: skip
    """x [n, i] times the transpose of the weight [o, i] = (code - zero) * scale * columns: [n, o] in the dtype of x.

    plane: uint8 [o, b], codes of 1, 2, 4 or 8 bits as `pack` packs them; scale [o, g], one for `group` neighbouring
    columns; zero [o, g] of any type; None: `middle` everywhere. columns [i]; None: 1.
    The reference computes in float32, or float64 where given that.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    inputs = x.shape[1]
    owner = torch.arange(inputs, device=x.device) // group
    codes = unpack(plane, bits, inputs).to(exact)
    below = middle if zero is None else zero.to(exact)[:, owner]
    weight = (codes - below) * scale.to(exact)[:, owner]
    if columns is not None:
        weight *= columns.to(exact)
    return linear(x.to(exact), weight).to(x.dtype)
