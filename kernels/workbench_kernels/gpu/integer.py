"""Triton kernels around a product of integers: inputs are rounded in one pass, and sums scaled in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.int_mm import int_mm, missing, widened
from workbench_kernels.limits import LEAST_STEP

_BLOCK = 1024
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added to a small number, rounds it to an integer, halves to even


@triton.jit
def _rounded(
    x, codes, steps, tokens, inputs, width,
    MOST: tl.constexpr, SHARE: tl.constexpr, TINY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token, as `workbench_kernels.integer.input_codes` rounds it; tokens that are not there become zeros."""
    real = tl.program_id(0) < tokens
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < tl.where(real, inputs, 0)
    number = tl.load(x + token * inputs + column, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(number), 0) * SHARE, TINY)
    whole = tl.div_rn(number, tl.zeros_like(number) + step)
    whole = tl.minimum(tl.maximum(whole, -MOST), MOST)  # before: halves are never beyond
    whole = (whole + _ROUNDER) - _ROUNDER
    tl.store(codes + token * width + column, whole.to(tl.int8), mask=column < width)
    tl.store(steps + token, step, mask=real)


def rounded(x: Tensor, bits: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """x [n, i] as whole numbers int8 [rows, width], zeros beyond its own, and the step of each token float32 [n]."""
    tokens, inputs = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    steps = torch.empty(tokens, dtype=torch.float32, device=x.device)
    most, columns = 2 ** (bits - 1) - 1, triton.next_power_of_2(width)
    _rounded[(rows,)](
        x.contiguous(), codes, steps, tokens, inputs, width,
        MOST=most, SHARE=1 / most, TINY=LEAST_STEP, COLUMNS=columns, num_warps=min(max(columns // 512, 1), 16),
    )  # fmt: skip
    return codes, steps


@triton.jit
def _scaled(sums, steps, scale, bias, out, outputs, width, BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < outputs
    total = tl.load(sums + token * width + column, mask=mask, other=0).to(tl.float32)
    total = total * tl.load(steps + token) * tl.load(scale + column, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * outputs + column, total.to(out.dtype.element_ty), mask=mask)


def scaled(sums: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None, outputs: int, dtype: torch.dtype) -> Tensor:
    """sums int32 [rows, width] times steps [n] and scale [o], plus bias [o]: [n, o], and nothing of what was added."""
    out = torch.empty(steps.numel(), outputs, dtype=dtype, device=sums.device)
    if out.numel():
        _scaled[(triton.cdiv(outputs, _BLOCK), steps.numel())](
            sums, steps, scale, scale if bias is None else bias, out, outputs, sums.shape[1],
            BIAS=bias is not None, COLUMNS=_BLOCK,
        )  # fmt: skip
    return out


def integer_linear(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """See `workbench_kernels.integer.integer_linear`."""
    rows, outputs, columns = missing(x, weight)
    codes, step = rounded(x, bits, x.shape[0] + rows, x.shape[1] + columns)
    sums = int_mm(codes, widened(weight, outputs, columns))
    return scaled(sums, step, scale, bias, weight.shape[0], x.dtype)
