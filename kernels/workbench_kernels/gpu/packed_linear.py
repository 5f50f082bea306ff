"""Triton kernel for what `workbench_kernels.packed_linear` says. What counts is that every byte is read once.

A program has a few outputs and all of their inputs, over which its warps lie side by side: sums of one output are added
up once, at the end, always in the same order. Rows are unrolled, and each is as large as what is loaded of the inputs,
so that a thread multiplies what it has loaded itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.limits import RUN

_PROGRAMS = 1024  # at least, so that no multiprocessor is idle
_SUMS = 2  # of one program, each in 16 registers of every thread


class Config(NamedTuple):
    """How a program works: outputs, runs of bytes of each that it reads at a time, warps."""

    rows: int
    runs: int
    warps: int


CONFIGS = tuple(
    Config(rows, runs, warps)
    for rows, runs, warps in (
        (1, 16, 2), (1, 32, 4), (1, 64, 8), (2, 16, 2), (2, 32, 4), (2, 64, 8), (4, 16, 2), (4, 32, 4), (4, 32, 8),
        (8, 16, 2),
    )
)  # fmt: skip


@triton.jit
def _product(
    x, plane, scale, zero, columns, out, outputs, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of all tokens. Rows beyond the last output are the last one again, which is not written."""
    first_row = tl.program_id(0) * ROWS
    run, place = tl.arange(0, RUNS) * RUN, tl.arange(0, RUN)
    totals = ()
    for _ in tl.static_range(TOKENS * ROWS):
        totals += (tl.zeros([RUNS, RUN], tl.float32),)
    for first in range(0, width, RUNS * RUN):
        byte = first + run[:, None] + place[None, :]
        inside = first + run < width
        held = ()
        for r in tl.static_range(ROWS):
            line = tl.minimum(first_row + r, outputs - 1).to(tl.int64)
            held += (tl.load(plane + line * width + byte, mask=inside[:, None], other=0),)
        for field in tl.static_range(8 // BITS):
            column = field * width + byte
            group = (field * width + first + run) // GROUP
            numbers = ()
            for token in tl.static_range(TOKENS):
                number = tl.load(x + token * width * (8 // BITS) + column, mask=inside[:, None], other=0.0)
                if COLUMNS:
                    factor = tl.load(columns + column, mask=inside[:, None], other=0.0).to(tl.float32)
                    numbers += (number.to(tl.float32) * factor,)
                else:
                    numbers += (number.to(tl.float32),)
            sums = ()
            for r in tl.static_range(ROWS):
                at = tl.minimum(first_row + r, outputs - 1).to(tl.int64) * groups + group
                step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
                if ZERO:
                    begin = step * -tl.load(zero + at, mask=inside, other=0).to(tl.float32)
                else:
                    begin = step * -MIDDLE
                # A code where it stands in its byte, in the lowest bits of 2 ** 23: its steps are as much smaller.
                code = (held[r].to(tl.int32) & ((2**BITS - 1) << (field * BITS))) | 0x4B000000
                level = code.to(tl.float32, bitcast=True) - 8388608.0
                weight = level * (step * (0.5 ** (field * BITS)))[:, None] + begin[:, None]
                for token in tl.static_range(TOKENS):
                    sums += (totals[r * TOKENS + token] + weight * numbers[token],)
            totals = sums
    for r in tl.static_range(ROWS):
        for token in tl.static_range(TOKENS):
            total = tl.sum(tl.sum(totals[r * TOKENS + token], 1), 0)
            at = out + token * outputs + first_row + r
            tl.store(at, total.to(out.dtype.element_ty), mask=first_row + r < outputs)


def usual(outputs: int, width: int, tokens: int) -> Config:
    """What is taken where nothing else is asked for: 16 bytes a thread of each output."""
    rows = max(_SUMS // tokens, 1)
    while rows > 1 and outputs < rows * _PROGRAMS:
        rows //= 2
    runs = min(triton.next_power_of_2(triton.cdiv(width, RUN)), 32)
    return Config(rows, runs, max(runs // 8, 1))


def packed_linear(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `workbench_kernels.packed_linear.packed_linear`."""
    outputs, width = plane.shape
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    config = config or usual(outputs, width, x.shape[0])
    _product[(triton.cdiv(outputs, config.rows),)](
        x.contiguous(), plane, scale, scale if zero is None else zero, scale if columns is None else columns, out,
        outputs, width, scale.shape[1],
        BITS=bits, GROUP=group, MIDDLE=middle, ZERO=zero is not None, COLUMNS=columns is not None, TOKENS=x.shape[0],
        ROWS=config.rows, RUNS=config.runs, RUN=RUN, num_warps=config.warps,
    )  # fmt: skip
    return out
