"""The weights of a linear layer as numbers of floating point, from the packed or sparse form that is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import FLOATS, WIDEST_SPARSE
from workbench_kernels.packing import unpack


def _takes_packed(
    planes: Sequence[Tensor], scale: Tensor, zero: Tensor | None, columns: Tensor | None, dtype: torch.dtype
) -> bool:
    return on_gpu(*planes, scale, zero, columns) and dtype in FLOATS and scale.numel() > 0


@with_kernel("gpu.weight:packed_weight", when=_takes_packed)
def packed_weight(
    planes: Sequence[Tensor], widths: Sequence[int], scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    group: int, middle: float, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight [o, inputs] = (code - zero) * scale * columns, as `dtype`.

    planes: uint8 [o, b] each, as `pack` packs codes of so many `widths` of bits; those of a second one, no wider, stand
    above those of the first. scale [o, g], one for `group` neighbouring columns, of which the last may be fewer; zero
    [o, g] of any type; None: `middle` everywhere. columns [inputs]; None: 1.
    """
    return scaled_weight(packed_codes(planes, widths, inputs), scale, zero, columns, group, middle, dtype)


def packed_codes(planes: Sequence[Tensor], widths: Sequence[int], inputs: int) -> Tensor:
    """The codes that planes hold together, uint8 [o, inputs]."""
    together: Tensor | None = None
    below = 0
    for plane, width in zip(planes, widths, strict=True):
        codes = unpack(plane, width, inputs)
        together = codes if together is None else together.bitwise_or_(codes << below)
        below += width
    assert together is not None
    return together


def scaled_weight(
    numbers: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, group: int, middle: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(number - zero) * scale * columns of numbers [o, i], as `packed_weight` says, in plain PyTorch."""
    exact = dtype if dtype.itemsize > 4 else torch.float32  # of what is computed; rounded once, when it is written
    scale = scale.to(exact)
    begin = scale * -(middle if zero is None else zero.to(exact))  # exact: 11 bits times 11
    weight = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    whole = numbers.shape[1] // group
    edge, shape = whole * group, (-1, group)
    for part, part_numbers, groups in (
        (weight[:, :edge].unflatten(1, shape), numbers[:, :edge].unflatten(1, shape), slice(0, whole)),
        (weight[:, None, edge:], numbers[:, None, edge:], slice(whole, None)),
    ):
        if part.numel():
            torch.addcmul(begin[:, groups, None], part_numbers, scale[:, groups, None], out=part)
    return weight if columns is None else weight.mul_(columns.to(dtype))


def _takes_sparse(bitmap: Tensor, values: Tensor, starts: Tensor | None, inputs: int, dtype: torch.dtype) -> bool:
    return on_gpu(bitmap, values, starts) and dtype in FLOATS and inputs <= WIDEST_SPARSE and bitmap.numel() > 0


@with_kernel("gpu.weight:sparse_weight", when=_takes_sparse)
def sparse_weight(bitmap: Tensor, values: Tensor, starts: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight [o, inputs] of which only `values` [m] are held, row after row, as `dtype`; the others are zero.

    bitmap: uint8 [o, b], one bit a weight, as `pack` packs them. starts: int32 [o + 1], where each row's values begin,
    counted from any number; None where all rows hold equally many.
    """
    del starts  # the kernel's
    mask = unpack(bitmap, 1, inputs).view(torch.bool)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter_(mask, values.to(dtype))


def _takes_plane(plane: Tensor) -> bool:
    return on_gpu(plane) and plane.numel() > 0


@with_kernel("gpu.weight:nibbles", when=_takes_plane)
def nibbles(plane: Tensor) -> Tensor:
    """Codes of 4 bits, less 8 and times 16, as int8 [o, 2 b]: each stands in the upper half of its byte.

    plane: uint8 [o, b] as `pack` packs codes.
    """
    half = plane.shape[1]  # a byte holds a code of the first columns below one of the last
    turned = plane ^ 0x88
    whole = plane.new_empty(plane.shape[0], 2 * half)
    torch.bitwise_left_shift(turned, 4, out=whole[:, :half])
    torch.bitwise_and(turned, 0xF0, out=whole[:, half:])
    return whole.view(torch.int8)
