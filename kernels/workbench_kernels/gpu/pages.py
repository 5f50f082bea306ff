"""The kernels for what `workbench_kernels.pages` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power
from workbench_kernels.rows import Ragged

_PAGES = 16  # that a program scores at once


@triton.jit
def _scores(
    query, keys, starts, lengths, bounds, out, pages, stride, page,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N pages of one head."""
    head = tl.program_id(0)
    number, d = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, DP)
    inside, channel = number < pages, d < D
    length = tl.load(lengths + head)
    last = length - 1
    new = tl.load(keys + (tl.load(starts + head) + last).to(tl.int64) * D + d, mask=channel, other=0.0)
    new = new.to(bounds.dtype.element_ty).to(tl.float32)[None, :]
    base = bounds + head.to(tl.int64) * stride + number[:, None] * (2 * D) + d[None, :]
    both = inside[:, None] & channel[None, :]
    least = tl.load(base, mask=both, other=0.0).to(tl.float32)
    greatest = tl.load(base + D, mask=both, other=0.0).to(tl.float32)
    here = (number == last // page)[:, None]
    fresh = last % page == 0
    least = tl.where(here, tl.where(fresh, new, tl.minimum(least, new)), least)
    greatest = tl.where(here, tl.where(fresh, new, tl.maximum(greatest, new)), greatest)
    tl.store(base, least.to(bounds.dtype.element_ty), mask=both & here)
    tl.store(base + D, greatest.to(bounds.dtype.element_ty), mask=both & here)
    for one in range(G):
        line = (head * G + one).to(tl.int64)
        asked = tl.load(query + line * D + d, mask=channel, other=0.0).to(tl.float32)[None, :]
        highest = tl.sum(tl.maximum(asked * least, asked * greatest), 1)
        tl.store(out + line * pages + number, tl.where(number * page < length, highest, float("-inf")), mask=inside)


def page_scores(query: Tensor, keys: Ragged, bounds: Tensor, page: int) -> Tensor:
    """See `workbench_kernels.pages.page_scores`."""
    heads, groups, width = query.shape
    pages = bounds.shape[1]
    out = torch.empty(heads, groups, pages, device=query.device)
    _scores[(heads, -(-pages // _PAGES))](
        query.contiguous(), keys.data, keys.starts, keys.lengths, bounds, out, pages, bounds.stride(0), page,
        G=groups, D=width, DP=power(width), N=_PAGES, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _rows(
    chosen, keys, values, key_starts, value_starts, lengths, key_out, value_out, hidden, count, page,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N rows of one query head."""
    one, place = tl.program_id(0), tl.program_id(1) * N + tl.arange(0, N)
    head = one // G
    inside = place < count
    number = tl.load(chosen + one.to(tl.int64) * (count // page) + place // page, mask=inside, other=0)
    row = number * page + place % page
    real = inside & (row < tl.load(lengths + head))
    line = one.to(tl.int64) * count + place
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    key_at = keys + (tl.load(key_starts + head) + row)[:, None] * D + d[None, :]
    key = tl.load(key_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    tl.store(key_out + line[:, None] * D + d[None, :], key, mask=inside[:, None] & (d < D)[None, :])
    value_at = values + (tl.load(value_starts + head) + row)[:, None] * DV + dv[None, :]
    value = tl.load(value_at, mask=real[:, None] & (dv < DV)[None, :], other=0.0)
    tl.store(value_out + line[:, None] * DV + dv[None, :], value, mask=inside[:, None] & (dv < DV)[None, :])
    tl.store(hidden + line, 1 - real.to(tl.int32), mask=inside)


def page_rows(chosen: Tensor, keys: Ragged, values: Ragged, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `workbench_kernels.pages.page_rows`."""
    heads, groups, wanted = chosen.shape
    count, (width, value_width) = wanted * page, (of.data.shape[1] for of in (keys, values))
    every = heads * groups
    key = torch.empty(every, count, width, dtype=keys.data.dtype, device=chosen.device)
    value = torch.empty(every, count, value_width, dtype=values.data.dtype, device=chosen.device)
    hidden = torch.empty(every, count, 1, dtype=torch.int32, device=chosen.device)
    if count:
        _rows[(every, -(-count // 32))](
            chosen.contiguous(), keys.data, values.data, keys.starts, values.starts, keys.lengths, key, value, hidden,
            count, page,
            G=groups, D=width, DP=power(width), DV=value_width, DVP=power(value_width), N=32, num_warps=4,
        )  # fmt: skip
    return key, value, hidden
