"""Triton kernel that multiplies some tokens with packed weights by the matrix units; weights are float in registers.

Where outputs are too few to keep a GPU busy, programs share the inputs of one block of outputs: each leaves its sums,
and another kernel adds them up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.limits import RUN, SOME

_OUTPUTS = 64  # of a program
_PROGRAMS = 528  # at least, if the inputs are long enough: four for each multiprocessor of an H100
_BLOCK = 256  # outputs of a program that adds up


@triton.jit
def _product(
    x, plane, scale, zero, columns, out, tokens, outputs, width, groups, runs,
    BITS: tl.constexpr, GROUP: tl.constexpr, MIDDLE: tl.constexpr, ZERO: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """ROWS outputs, and `runs` runs of bytes of each: out float32 [parts, tokens, outputs]; TOKENS - tokens idle."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < outputs
    line = row.to(tl.int64)
    token, place = tl.arange(0, TOKENS), tl.arange(0, RUN)
    here = token < tokens
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    begin = tl.program_id(1) * runs * RUN
    for first in range(begin, tl.minimum(begin + runs * RUN, width), RUN):
        at = plane + (line * width)[:, None] + (first + place)[None, :]
        held = tl.load(at, mask=real[:, None], other=0).to(tl.int32)
        for field in tl.static_range(8 // BITS):
            column = field * width + first + place
            at = x + token[None, :] * width * (8 // BITS) + column[:, None]
            numbers = tl.load(at, mask=here[None, :], other=0.0)  # [RUN, TOKENS]
            group = (field * width + first) // GROUP
            step = tl.load(scale + line * groups + group, mask=real, other=0.0).to(tl.float32)
            if ZERO:
                start = step * -tl.load(zero + line * groups + group, mask=real, other=0).to(tl.float32)
            else:
                start = step * -MIDDLE
            code = ((held >> (field * BITS)) & (2**BITS - 1)) | 0x4B000000
            weight = (code.to(tl.float32, bitcast=True) - 8388608.0) * step[:, None] + start[:, None]
            if COLUMNS:
                weight *= tl.load(columns + column).to(tl.float32)[None, :]
            total += tl.dot(weight.to(numbers.dtype), numbers)
    at = out + (tl.program_id(1) * tokens + token[None, :]) * outputs + row[:, None]
    tl.store(at, total, mask=real[:, None] & here[None, :])


@triton.jit
def _add(parts, out, count, size, BLOCK: tl.constexpr):
    """out [size] is the sum of parts float32 [count, size], in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def packed_matmul(
    x: Tensor, plane: Tensor, scale: Tensor, zero: Tensor | None, columns: Tensor | None, bits: int, group: int,
    middle: float,
) -> Tensor:  # fmt: skip
    """See `workbench_kernels.packed_linear.packed_linear`; SOME tokens of 16 bits, or fewer."""
    (outputs, width), tokens = plane.shape, x.shape[0]
    blocks = triton.cdiv(outputs, _OUTPUTS)
    runs = triton.cdiv(width // RUN, max(_PROGRAMS // blocks, 1))
    parts = triton.cdiv(width // RUN, runs)
    sums = torch.empty(parts, tokens, outputs, dtype=torch.float32, device=x.device)
    _product[(blocks, parts)](
        x.contiguous(), plane, scale, scale if zero is None else zero, scale if columns is None else columns, sums,
        tokens, outputs, width, scale.shape[1], runs,
        BITS=bits, GROUP=group, MIDDLE=middle, ZERO=zero is not None, COLUMNS=columns is not None, TOKENS=SOME,
        ROWS=_OUTPUTS, RUN=RUN, num_warps=4,
    )  # fmt: skip
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    _add[(triton.cdiv(out.numel(), _BLOCK),)](sums, out, parts, out.numel(), BLOCK=_BLOCK, num_warps=2)
    return out
