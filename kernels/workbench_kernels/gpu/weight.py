"""Triton kernels that write the float weights of a linear layer once, straight from what is held of them.

A program reads some bytes of some rows, once, and writes the weights of all their bits: neighbouring bytes hold
neighbouring columns, a field of columns for each position within a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 4096
"""Packed bytes that a program reads; four warps."""
_RUN = 64  # bytes in a row whose codes share a scale, at most


@triton.jit
def _packed(
    low, high, scale, zero, columns, out, outputs, inputs, low_width, width, groups,
    LOW: tl.constexpr, HIGH: tl.constexpr, RATIO: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
    FULL: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """ROWS rows and RUNS * RUN bytes of the narrowest plane, of `width` bytes a row; RATIO times as wide is the other.

    ALIGNED: a field of the narrow plane is a piece of a field of the wide one, so that its bytes are neighbours there.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < outputs
    line = row.to(tl.int64)
    run, place = tl.program_id(0) * (RUNS * RUN) + tl.arange(0, RUNS) * RUN, tl.arange(0, RUN)
    byte = (run[:, None] + place[None, :])[None]  # [1, RUNS, RUN]
    there = real[:, None] & (run < width)[None, :]  # [ROWS, RUNS]
    mask = there[:, :, None]
    if HIGH:
        above = tl.load(high + (line * width)[:, None, None] + byte, mask=mask, other=0).to(tl.int32)
    for piece in tl.static_range(RATIO):
        if ALIGNED:
            at = low + (line * low_width)[:, None, None] + (piece * width + byte)
            below = tl.load(at, mask=mask, other=0).to(tl.int32)
        for field in tl.static_range(FIELDS):
            number = field * RATIO + piece
            column = number * width + byte
            inside = mask if FULL else mask & (column < inputs)
            if ALIGNED:
                code = (below >> (field * LOW)) & (2**LOW - 1)
            else:
                at = low + (line * low_width)[:, None, None] + column % low_width
                found = tl.load(at, mask=inside, other=0).to(tl.int32)
                code = (found >> (column // low_width * LOW)) & (2**LOW - 1)
            if HIGH:
                code |= ((above >> (number * HIGH)) & (2**HIGH - 1)) << LOW
            # 2 ** 23 + code, less 2 ** 23: several times as fast as converting an integer
            x = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            group = (number * width + run) // GROUP
            given = there & (group < groups)[None, :]
            at_group = (line * groups)[:, None] + group[None, :]
            step = tl.load(scale + at_group, mask=given, other=0.0).to(tl.float32)
            if ZERO:
                begin = step * -tl.load(zero + at_group, mask=given, other=0).to(tl.float32)
            else:
                begin = step * -MIDDLE
            x = x * step[:, :, None] + begin[:, :, None]
            if COLUMNS:
                # As many addresses as weights, so that each thread loads what it multiplies.
                beside = tl.broadcast_to(columns + column, (ROWS, RUNS, RUN))
                x *= tl.load(beside, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + (line * inputs)[:, None, None] + column, x.to(out.dtype.element_ty), mask=inside)


def packed_weight(
    planes: Sequence[Tensor], widths: Sequence[int], scale: Tensor, zero: Tensor | None, columns: Tensor | None,
    group: int, middle: float, inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `workbench_kernels.weight.packed_weight`."""
    low, high = planes[0].contiguous(), planes[-1].contiguous()
    (outputs, low_width), width = low.shape, high.shape[1]
    ratio, fields = widths[0] // widths[-1], 8 // widths[0]
    aligned, run = low_width == ratio * width, gcd(width, group, _RUN)
    tile = BYTES if aligned and run >= 16 else BYTES // 8  # single bytes take many more registers
    runs = min(triton.next_power_of_2(triton.cdiv(width, run)), tile // 2 // run)
    rows = tile // (runs * run)
    out = torch.empty(outputs, inputs, dtype=dtype, device=low.device)
    _packed[(triton.cdiv(width, runs * run), triton.cdiv(outputs, rows))](
        low, high, scale.contiguous(), scale if zero is None else zero.contiguous(),
        scale if columns is None else columns, out, outputs, inputs, low_width, width, scale.shape[1],
        LOW=widths[0], HIGH=widths[1] if len(widths) > 1 else 0, RATIO=ratio, FIELDS=fields,
        ALIGNED=aligned, FULL=inputs == ratio * fields * width, GROUP=group, MIDDLE=middle,
        ZERO=zero is not None, COLUMNS=columns is not None, ROWS=rows, RUNS=runs, RUN=run,
    )  # fmt: skip
    return out


@triton.jit
def counted(held, half: tl.constexpr):
    """How many bits of four fields are set up to each byte of held [b], and in all: four counts of 16 bits, side by
    side in int64. half: of which fields, the first four or the last.
    """
    spread = (held >> (4 * half) & 1).to(tl.int64)
    for field in tl.static_range(1, 4):
        spread |= ((held >> (4 * half + field)) & 1).to(tl.int64) << (16 * field)
    return tl.cumsum(spread, 0), tl.sum(spread, 0)


@triton.jit
def _sparse(
    bitmap, values, starts, out, inputs, width, each, EVEN: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """A row. A value's place is how many bits are set before its own, counted four fields at a time.

    All tensors have one dimension, in which each thread owns the same bytes whatever it loads or stores.
    """
    row = tl.program_id(0).to(tl.int64)
    if EVEN:
        before = row * each
    else:
        before = (tl.load(starts + row) - tl.load(starts)).to(tl.int64)
    j = tl.arange(0, BYTES)
    there = j < width
    held = tl.load(bitmap + row * width + j, mask=there, other=0).to(tl.int32)
    values += before
    out += row * inputs
    first = 0
    for half in tl.static_range(2):
        seen, whole = counted(held, half)
        for field in tl.static_range(4):
            bit = (held >> (4 * half + field)) & 1
            place = first + ((seen >> (16 * field)) & 0xFFFF).to(tl.int32) - 1
            x = tl.load(values + place, mask=bit != 0, other=0)
            column = (4 * half + field) * width + j
            tl.store(out + column, x.to(out.dtype.element_ty), mask=there & (column < inputs))
            first += ((whole >> (16 * field)) & 0xFFFF).to(tl.int32)


def warps_of(width: int) -> int:
    """Of a program for a row of so many bytes of bits: eight bytes a thread."""
    return min(max(width // 256, 1), 16)


def sparse_weight(bitmap: Tensor, values: Tensor, starts: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """See `workbench_kernels.weight.sparse_weight`."""
    outputs, width = bitmap.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=bitmap.device)
    padded = triton.next_power_of_2(width)
    _sparse[(outputs,)](
        bitmap.contiguous(), values.contiguous(), bitmap if starts is None else starts, out, inputs, width,
        values.numel() // outputs, EVEN=starts is None, BYTES=padded, num_warps=warps_of(padded),
    )  # fmt: skip
    return out


@triton.jit
def _nibbles(plane, out, outputs, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < outputs)[:, None] & (j < width)[None, :]
    line = row.to(tl.int64)[:, None] * width
    turned = tl.load(plane + line + j[None, :], mask=mask, other=0) ^ 0x88
    at = out + 2 * line + j[None, :]
    tl.store(at, (turned << 4).to(tl.uint8), mask=mask)
    tl.store(at + width, (turned & 0xF0).to(tl.uint8), mask=mask)


def nibbles(plane: Tensor) -> Tensor:
    """See `workbench_kernels.weight.nibbles`."""
    outputs, width = plane.shape
    out = torch.empty(outputs, 2 * width, dtype=torch.uint8, device=plane.device)
    columns = min(triton.next_power_of_2(width), BYTES)
    rows = max(BYTES // columns, 1)
    _nibbles[(triton.cdiv(width, columns), triton.cdiv(outputs, rows))](
        plane.contiguous(), out, outputs, width, COLUMNS=columns, ROWS=rows
    )
    return out.view(torch.int8)
