"""Triton kernel for what `workbench_kernels.sparse_linear` says: a row's values are multiplied where they are found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.weight import counted, warps_of


@triton.jit
def _product(
    x, bitmap, values, starts, out, outputs, inputs, width, each,
    EVEN: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """An output of all tokens; values are found as `workbench_kernels.gpu.weight` finds them."""
    row = tl.program_id(0).to(tl.int64)
    if EVEN:
        values += row * each
    else:
        values += tl.load(starts + row) - tl.load(starts)
    j = tl.arange(0, BYTES)
    there = j < width
    held = tl.load(bitmap + row * width + j, mask=there, other=0).to(tl.int32)
    totals = ()
    for _ in tl.static_range(TOKENS):
        totals += (tl.zeros([BYTES], tl.float32),)
    first = 0
    for half in tl.static_range(2):
        seen, whole = counted(held, half)
        for field in tl.static_range(4):
            bit = (held >> (4 * half + field)) & 1
            place = first + ((seen >> (16 * field)) & 0xFFFF).to(tl.int32) - 1
            weight = tl.load(values + place, mask=bit != 0, other=0).to(tl.float32)
            column = (4 * half + field) * width + j
            inside = there & (column < inputs)
            sums = ()
            for token in tl.static_range(TOKENS):
                number = tl.load(x + token * inputs + column, mask=inside, other=0.0).to(tl.float32)
                sums += (totals[token] + weight * number,)
            totals = sums
            first += ((whole >> (16 * field)) & 0xFFFF).to(tl.int32)
    for token in tl.static_range(TOKENS):
        tl.store(out + token * outputs + row, tl.sum(totals[token], 0).to(out.dtype.element_ty))


def sparse_linear(x: Tensor, bitmap: Tensor, values: Tensor, starts: Tensor | None) -> Tensor:
    """See `workbench_kernels.sparse_linear.sparse_linear`."""
    (outputs, width), (tokens, inputs) = bitmap.shape, x.shape
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(width)
    _product[(outputs,)](
        x.contiguous(), bitmap.contiguous(), values.contiguous(), bitmap if starts is None else starts, out, outputs,
        inputs, width, values.numel() // outputs, EVEN=starts is None, TOKENS=tokens, BYTES=padded,
        num_warps=warps_of(padded),
    )  # fmt: skip
    return out
