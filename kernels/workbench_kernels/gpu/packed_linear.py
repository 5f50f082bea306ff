"""Triton kernel for what `workbench_kernels.packed_linear` says. What counts is that every byte is read once."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.packed_linear import RUN

_PROGRAMS = 256  # at least, so that no multiprocessor is idle


class Config(NamedTuple):
    """How a program works: outputs, runs of bytes of each that it reads at a time, warps."""

    rows: int
    runs: int
    warps: int


CONFIGS = tuple(Config(*each) for each in product((8, 16, 32), (2, 4, 8), (4, 8)))


@triton.jit
def _product(
    x, plane, scale, zero, columns, out, outputs, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """One token and ROWS outputs. Within a run of bytes a scale and a zero stand outside the sum."""
    token = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < outputs
    held_base = row.to(tl.int64) * width
    scale_base = row.to(tl.int64) * groups
    run, place = tl.arange(0, RUNS) * RUN, tl.arange(0, RUN)
    x += token * width * (8 // BITS)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, width, RUNS * RUN):
        byte = first + run[:, None] + place[None, :]  # [RUNS, RUN]
        inside = first + run < width
        there = real[:, None] & inside[None, :]  # [ROWS, RUNS]
        held = tl.load(plane + held_base[:, None, None] + byte[None, :, :], mask=there[:, :, None], other=0).to(
            tl.int32
        )
        for field in tl.static_range(8 // BITS):
            code = ((held >> (field * BITS)) & (2**BITS - 1)).to(tl.float32)  # [ROWS, RUNS, RUN]
            column = field * width + byte
            number = tl.load(x + column, mask=inside[:, None], other=0.0).to(tl.float32)
            if COLUMNS:
                number *= tl.load(columns + column, mask=inside[:, None], other=0.0).to(tl.float32)
            at = scale_base[:, None] + ((field * width + first + run) // GROUP)[None, :]
            step = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
            if ZERO:
                below = tl.load(zero + at, mask=there, other=0).to(tl.float32)
            else:
                below = MIDDLE
            part = tl.sum(code * number[None, :, :], 2)  # [ROWS, RUNS]
            total += tl.sum(step * (part - below * tl.sum(number, 1)[None, :]), 1)
    tl.store(out + token * outputs + row, total.to(out.dtype.element_ty), mask=real)


def usual(outputs: int) -> Config:
    """What is taken where nothing else is asked for."""
    rows = 16
    while rows > 2 and outputs < rows * _PROGRAMS:
        rows //= 2
    return Config(rows, 4, 4)


def packed_linear(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `workbench_kernels.packed_linear.packed_linear`."""
    outputs, width = plane.shape
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    config = config or usual(outputs)
    _product[(x.shape[0], triton.cdiv(outputs, config.rows))](
        x.contiguous(), plane, scale, scale if zero is None else zero, scale if columns is None else columns, out,
        outputs, width, scale.shape[1],
        BITS=bits, GROUP=group, MIDDLE=middle, ZERO=zero is not None, COLUMNS=columns is not None,
        ROWS=config.rows, RUNS=config.runs, RUN=RUN, num_warps=config.warps,
    )  # fmt: skip
    return out
