"""The weights of a linear layer as numbers of floating point, from the packed or sparse form that is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu
from workbench_kernels.packing import unpack

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 2**18  # columns of a sparse row that one program takes


def packed_weight(
    planes: Sequence[Tensor], widths: Sequence[int], scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    group: int, middle: float, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight [o, inputs] = (code - zero) * scale * columns, as `dtype`.

    planes: uint8 [o, b] each, as `pack` packs codes of so many `widths` of bits; those of a second one, no wider, stand
    above those of the first. scale [o, g], one for `group` neighbouring columns, of which the last may be fewer; zero
    [o, g] of any type; None: `middle` everywhere. columns [inputs]; None: 1.
    """
    if on_gpu(*planes, scale, zero, columns) and dtype in _FLOATS and scale.numel():
        from workbench_kernels.gpu.weight import packed_weight as kernel

        return kernel(planes, widths, scale, zero, columns, group, middle, inputs, dtype)
    return packed_weight_reference(planes, widths, scale, zero, columns, group, middle, inputs, dtype)


def packed_weight_reference(
    planes: Sequence[Tensor], widths: Sequence[int], scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    group: int, middle: float, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch."""
    return scaled_weight(packed_codes(planes, widths, inputs), scale, zero, columns, group, middle, dtype)


def packed_codes(planes: Sequence[Tensor], widths: Sequence[int], inputs: int) -> Tensor:
    """The codes that planes hold together, uint8 [o, inputs]."""
    found, below = None, 0
    for plane, width in zip(planes, widths, strict=True):
        codes = unpack(plane, width, inputs)
        found = codes if found is None else found.bitwise_or_(codes << below)
        below += width
    assert found is not None
    return found


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
    for part, of, own in (
        (weight[:, :edge].unflatten(1, shape), numbers[:, :edge].unflatten(1, shape), slice(0, whole)),
        (weight[:, None, edge:], numbers[:, None, edge:], slice(whole, None)),
    ):
        if part.numel():
            torch.addcmul(begin[:, own, None], of, scale[:, own, None], out=part)
    return weight if columns is None else weight.mul_(columns.to(dtype))


def sparse_weight(bitmap: Tensor, values: Tensor, starts: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight [o, inputs] of which only `values` [m] are held, row after row, as `dtype`; the others are zero.

    bitmap: uint8 [o, b], one bit a weight, as `pack` packs them. starts: int32 [o + 1], where each row's values begin,
    counted from any number; None where all rows hold equally many.
    """
    if on_gpu(bitmap, values, starts) and dtype in _FLOATS and inputs <= WIDEST and bitmap.numel():
        from workbench_kernels.gpu.weight import sparse_weight as kernel

        return kernel(bitmap, values, starts, inputs, dtype)
    return sparse_weight_reference(bitmap, values, starts, inputs, dtype)


def sparse_weight_reference(
    bitmap: Tensor, values: Tensor, starts: Tensor | None, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The same in plain PyTorch."""
    held = unpack(bitmap, 1, inputs).view(torch.bool)
    return torch.zeros(held.shape, dtype=dtype, device=held.device).masked_scatter_(held, values.to(dtype))


def nibbles(plane: Tensor) -> Tensor:
    """Codes of 4 bits, less 8 and times 16, as int8 [o, 2 b]: each stands in the upper half of its byte.

    plane: uint8 [o, b] as `pack` packs codes.
    """
    if on_gpu(plane) and plane.numel():
        from workbench_kernels.gpu.weight import nibbles as kernel

        return kernel(plane)
    return nibbles_reference(plane)


def nibbles_reference(plane: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    half = plane.shape[1]  # a byte holds a code of the first columns below one of the last
    turned = plane ^ 0x88
    whole = plane.new_empty(plane.shape[0], 2 * half)
    torch.bitwise_left_shift(turned, 4, out=whole[:, :half])
    torch.bitwise_and(turned, 0xF0, out=whole[:, half:])
    return whole.view(torch.int8)
