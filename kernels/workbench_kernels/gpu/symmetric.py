"""The newest row of each head rounded to integers around zero, and queries for rows held so, in one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power
from workbench_kernels.rows import Ragged

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: what is added to it is rounded to integers, halves to even ones


@triton.jit
def _shortened(x, DROPPED: tl.constexpr):
    """Positive float32 numbers without their last DROPPED bits, rounded to nearest, ties to even."""
    word = x.to(tl.int32, bitcast=True)
    word += ((1 << (DROPPED - 1)) - 1) + ((word >> DROPPED) & 1)
    return (word & (-1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def _fp8(x):
    """Positive numbers up to 448 as the nearest of float8_e4m3fn."""
    small = (x * 512.0 + _ROUND) - _ROUND  # below 2 ** -6 they are multiples of 2 ** -9
    return tl.where(x < 0.015625, small * 0.001953125, _shortened(x, 20))


@triton.jit
def _smoothed(query, factors, out, groups, queries, D: tl.constexpr, DP: tl.constexpr, FP8: tl.constexpr):
    line = tl.program_id(0)
    d = tl.arange(0, DP)
    inside = d < D
    head = line // (groups * queries)
    x = tl.load(query + line.to(tl.int64) * D + d, mask=inside, other=0.0).to(tl.float32)
    x = x / tl.load(factors + head * D + d, mask=inside, other=1.0).to(tl.float32)
    if FP8:
        size = tl.max(tl.abs(x), 0) / 448.0
        size = tl.where(size > 0, size, 1.0)
        found = _fp8(tl.minimum(tl.abs(x) / size, 448.0)) * size
        x = tl.where(x < 0, -found, found)
    tl.store(out + line.to(tl.int64) * D + d, x, mask=inside)


def smoothed_query(query: Tensor, factors: Tensor, fp8: bool) -> Tensor:
    """See `workbench_kernels.symmetric.smoothed_query`."""
    query = query.contiguous()
    out = torch.empty_like(query)
    heads, count, width = query.shape
    _smoothed[(heads * count,)](
        query, factors, out, heads // factors.shape[0], count, D=width, DP=power(width), FP8=fp8, num_warps=1
    )
    return out


@triton.jit
def _rounded(x, starts, lengths, factors, into, head, D: tl.constexpr, GROUP: tl.constexpr,
             GP: tl.constexpr, BITS: tl.constexpr, DROPPED: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """A row; DROPPED: bits of float32 that its scales lack, 0: they are float16, 20: FP8."""
    row = (tl.load(starts + head) + tl.load(lengths + head) - 1).to(tl.int64) * D
    most: tl.constexpr = 2 ** (BITS - 1) - 1
    for begin in tl.static_range(0, D, GROUP):
        d = begin + tl.arange(0, GP)
        inside = (d < D) & (d < begin + GROUP)
        if KEYS:
            factor = tl.load(factors + head * D + d, mask=inside, other=1.0).to(tl.float32)
        else:
            factor = tl.load(factors + head).to(tl.float32)
        number = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32) * factor
        scale = tl.max(tl.abs(number), 0) / most
        if DROPPED == 0:
            scale = scale.to(tl.float16).to(tl.float32)
        elif DROPPED == 20:
            scale = _fp8(scale)
        else:
            scale = _shortened(scale, DROPPED)
        code = (number / tl.where(scale > 0, scale, 1.0) + _ROUND) - _ROUND
        found = tl.minimum(tl.maximum(code, -most - 1.0), most) * scale
        if not KEYS:
            found = found / factor
        tl.store(into + row + d, found, mask=inside)


@triton.jit
def _round(
    keys, key_starts, key_lengths, key_factors, into_keys, values, value_starts, value_lengths, value_factors,
    into_values,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, BITS: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    if tl.program_id(1) == 0:
        _rounded(keys, key_starts, key_lengths, key_factors, into_keys, head, D, GROUP, GP, BITS, DROPPED, True)
    else:
        _rounded(
            values, value_starts, value_lengths, value_factors, into_values, head, DV, GROUP, GP, BITS, DROPPED,
            False,
        )  # fmt: skip


_DROPPED = {torch.float16: 0, torch.bfloat16: 16, torch.float8_e4m3fn: 20}


def round_newest(
    keys: Ragged,
    values: Ragged,
    key_factors: Tensor,
    value_factors: Tensor,
    bits: int,
    group: int,
    scales: torch.dtype,
    into_keys: Tensor,
    into_values: Tensor,
) -> None:
    """See `workbench_kernels.symmetric.round_newest`."""
    width, value_width = keys.data.shape[1], values.data.shape[1]
    _round[(keys.starts.numel(), 2)](
        keys.data, keys.starts, keys.lengths, key_factors, into_keys,
        values.data, values.starts, values.lengths, value_factors, into_values,
        D=width, DV=value_width, GROUP=group,
        GP=power(min(group, max(width, value_width))), BITS=bits, DROPPED=_DROPPED[scales], num_warps=1,
    )  # fmt: skip
