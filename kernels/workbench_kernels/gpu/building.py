"""Triton kernels that build a compressed cache: compaction of kept sets, gathers, quantising, sparse rows, and back.

A program takes some rows of one head, or one group of them, reads them from where they stand and writes them one head
after another. Packed bytes hold codes that lie a field of b channels apart: the fields of a tile are loaded apart, all
before the first is worked on, so that packing is a sum in registers and nothing moves between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from workbench_kernels.kept import Kept
from workbench_kernels.rows import Axis

TILE = 8192
"""Numbers that a program holds; four warps."""

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added to a small number, rounds it to an integer, halves to even
_KEY_BITS = {torch.float32: 31, torch.float16: 15, torch.bfloat16: 15}
_COUNT_BLOCK = 2048


# -- kept sets


@triton.jit
def _count(keep, sums, n, BLOCK: tl.constexpr):
    """How many of a block's tokens are kept: sums [k, blocks]."""
    head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    marks = tl.load(keep + head.to(tl.int64) * n + at, mask=at < n, other=0).to(tl.int32)
    tl.store(sums + head * tl.num_programs(0) + tl.program_id(0), tl.sum(marks, 0))


@triton.jit
def _list(keep, offsets, places, n, BLOCK: tl.constexpr):
    """Write down which of a block's tokens are kept; offsets [k, blocks]: where the block's first goes."""
    head = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    marks = tl.load(keep + head.to(tl.int64) * n + at, mask=at < n, other=0).to(tl.int32)
    before = tl.cumsum(marks, 0) - marks
    first = tl.load(offsets + head * tl.num_programs(0) + tl.program_id(0))
    tl.store(places + first + before, at, mask=marks != 0)


def kept(keep: Tensor) -> Kept:
    """See `workbench_kernels.building.kept`."""
    heads, tokens = keep.shape
    marks = keep.contiguous().view(torch.uint8)
    grid = (triton.cdiv(tokens, _COUNT_BLOCK), heads)
    sums = torch.empty(heads, grid[0], dtype=torch.int32, device=keep.device)
    _count[grid](marks, sums, tokens, BLOCK=_COUNT_BLOCK)
    ends = sums.flatten().cumsum(0, dtype=torch.int32)
    offsets = ends - sums.flatten()
    lengths = sums.sum(dim=1, dtype=torch.int32)
    starts = offsets.view(heads, -1)[:, 0].contiguous()
    counts = lengths.cpu().long()
    places = torch.empty(int(counts.sum()), dtype=torch.int32, device=keep.device)
    _list[grid](marks, offsets, places, tokens, BLOCK=_COUNT_BLOCK)
    return Kept(places, starts, starts, lengths, counts, tokens)


# -- where rows stand


@triton.jit
def _span(starts, begins, lengths, n, head, CHOSEN: tl.constexpr):
    """A head's first entry among the places, its first row in the results, and how many it has."""
    if CHOSEN:
        return tl.load(starts + head), tl.load(begins + head).to(tl.int64), tl.load(lengths + head)
    return head * 0, head.to(tl.int64) * n, n


@triton.jit
def _places(places, start, row, real, CHOSEN: tl.constexpr):
    """Which tokens rows number `row` of a head are."""
    if CHOSEN:
        return tl.load(places + start + row, mask=real, other=0)
    return row


def _whole(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _chosen(chosen: Kept | None, x: Tensor) -> tuple[tuple[Tensor | None, ...], int, int]:
    """Pointers of the chosen rows, their number, and that of the longest head."""
    if chosen is None:
        return (None, None, None, None), x.shape[0] * x.shape[1], x.shape[1]
    return (chosen.places, chosen.starts, chosen.begins, chosen.lengths), chosen.total, chosen.longest


# -- gathering


@triton.jit
def _copy(source, place, out, at, real, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    mask = real[:, None] & (d < D)[None, :]
    x = tl.load(source + (place[:, None] + d[None, :]), mask=mask)
    tl.store(out + (at[:, None] * D + d[None, :]), x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gather(
    places, starts, begins, lengths, x, x_head, x_row, x_out, y, y_head, y_row, y_out,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    start, begin, length = _span(starts, begins, lengths, 0, head, True)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < length:
        real = row < length
        place = _places(places, start, row, real, True).to(tl.int64)
        at = begin + row
        _copy(x + head.to(tl.int64) * x_head, place * x_row, x_out, at, real, D, DP)
        if BOTH:
            _copy(y + head.to(tl.int64) * y_head, place * y_row, y_out, at, real, E, EP)


def gather(xs: Sequence[Tensor], chosen: Kept, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """See `workbench_kernels.building.gather`."""
    found: list[Tensor] = []
    pointers, total, longest = _chosen(chosen, xs[0])
    for first in range(0, len(xs), 2):
        pair = [_whole(x) for x in xs[first : first + 2]]
        outs = [x.new_empty(total, x.shape[2], dtype=dtype) for x in pair]
        found += outs
        widths = [x.shape[2] for x in pair]
        if not total or not max(widths):
            continue
        padded = [triton.next_power_of_2(max(width, 1)) for width in widths]
        rows = max(TILE // max(padded), 1)
        _gather[(triton.cdiv(longest, rows), len(pair[0]))](
            *pointers, pair[0], pair[0].stride(0), pair[0].stride(1), outs[0],
            pair[-1], pair[-1].stride(0), pair[-1].stride(1), outs[-1],
            D=widths[0], DP=padded[0], E=widths[-1], EP=padded[-1], ROWS=rows, BOTH=len(pair) == 2,
        )  # fmt: skip
    return tuple(found)


# -- quantising


@triton.jit
def _divided(x, by, inverse, INTERPRET: tl.constexpr):
    """x / by, rounded once, from a reciprocal that is a little off, for divisors of at most 11 binary digits.

    A product with the reciprocal is corrected by its remainder, which is exact. No quotient by so few digits lies close
    enough to the middle of two numbers for the correction to fall on the wrong side.
    """
    if INTERPRET:  # which has no fused multiply-add
        return x / by
    near = x * inverse
    return tl.fma(tl.fma(-near, by, x), inverse, near)


@triton.jit
def _inverse(x, INTERPRET: tl.constexpr):
    """1 / x to the last digit or two."""
    if INTERPRET:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _levels(low, high, STEPS: tl.constexpr, INTERPRET: tl.constexpr):
    """Scale and zero as they are stored, and scale, its reciprocal and zero as they are used."""
    zero = low.to(tl.float16)
    bottom = zero.to(tl.float32)
    scale = _divided(high - bottom, STEPS, 1.0 / STEPS, INTERPRET).to(tl.float16)
    wide = scale.to(tl.float32)
    step = tl.where(wide > 0, wide, 1.0)
    return scale, zero, step, _inverse(step, INTERPRET), bottom


@triton.jit
def _coded(x, step, inverse, zero, STEPS: tl.constexpr, INTERPRET: tl.constexpr):
    """The codes of x in the low byte of int32; above it are other bits."""
    share = _divided(x - zero, step, inverse, INTERPRET)
    # An infinite step leaves no number, of which the larger with 0 is 0.
    share = tl.minimum(tl.maximum(share, 0.0), STEPS)
    return (share + _ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def _channels(
    places, starts, begins, lengths, x, x_head, x_row, n, balance, codes, scales, zeros,
    D: tl.constexpr, B: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    CHOSEN: tl.constexpr, BALANCED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One group of rows, COLS bytes of it: the channels j, j + B, j + 2 B and so on."""
    FIELDS: tl.constexpr = 8 // BITS
    STEPS: tl.constexpr = 2.0**BITS - 1
    head = tl.program_id(2)
    number = tl.program_id(0)
    start, begin, length = _span(starts, begins, lengths, n, head, CHOSEN)
    if number * GROUP < length:
        r = tl.arange(0, G)
        real = r < GROUP
        place = _places(places, start, number * GROUP + r, real, CHOSEN).to(tl.int64)
        source = x + head.to(tl.int64) * x_head + place * x_row
        j = tl.program_id(1) * COLS + tl.arange(0, COLS)
        loaded = ()
        for field in tl.static_range(FIELDS):
            c = field * B + j
            mask = real[:, None] & ((j < B) & (c < D))[None, :]
            loaded += (tl.load(source[:, None] + c[None, :], mask=mask, other=0.0),)
        packed = tl.zeros([G, COLS], tl.int32)
        group = begin // GROUP + number
        for field in tl.static_range(FIELDS):
            c = field * B + j
            inside = (j < B) & (c < D)
            v = loaded[field].to(tl.float32)
            if BALANCED:
                v = v * tl.load(balance + head.to(tl.int64) * D + c, mask=inside, other=1.0).to(tl.float32)[None, :]
            if G == GROUP:
                low, high = tl.min(v, 0), tl.max(v, 0)
            else:
                low = tl.min(tl.where(real[:, None], v, float("inf")), 0)
                high = tl.max(tl.where(real[:, None], v, float("-inf")), 0)
            scale, zero, step, inverse, bottom = _levels(low, high, STEPS, INTERPRET)
            tl.store(scales + group * D + c, scale, mask=inside)
            tl.store(zeros + group * D + c, zero, mask=inside)
            code = _coded(v, step[None, :], inverse[None, :], bottom[None, :], STEPS, INTERPRET)
            packed += code << (field * BITS)
        # Bytes would be stored 16 to a thread and all else cut alike; with 8, a thread reduces twice as many rows.
        at = tl.max_contiguous(codes + (begin + number * GROUP + r)[:, None] * B + j[None, :], [1, 8])
        tl.store(at, packed.to(tl.uint8), mask=real[:, None] & (j < B)[None, :])


@triton.jit
def _tokens(
    places, starts, begins, lengths, x, x_head, x_row, n, balance, codes, scales, zeros,
    D: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr, U: tl.constexpr,
    UNITS: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    CHOSEN: tl.constexpr, BALANCED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Some rows, whole. Fields (B channels) and groups (GROUP channels) are both cut into units of UNIT channels."""
    FIELDS: tl.constexpr = 8 // BITS
    STEPS: tl.constexpr = 2.0**BITS - 1
    head = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    start, begin, length = _span(starts, begins, lengths, n, head, CHOSEN)
    if first < length:
        row = first + tl.arange(0, ROWS)
        real = row < length
        place = _places(places, start, row, real, CHOSEN).to(tl.int64)
        source = x + head.to(tl.int64) * x_head + place * x_row
        s, u = tl.arange(0, S), tl.arange(0, U)
        j = s[:, None] * UNIT + u[None, :]  # [S, U]
        there = (s < UNITS)[:, None] & (u < UNIT)[None, :]
        loaded = ()
        for field in tl.static_range(FIELDS):
            c = field * B + j
            mask = real[:, None, None] & (there & (c < D))[None]
            v = tl.load(source[:, None, None] + c[None], mask=mask, other=0.0)
            if BALANCED:
                factor = tl.load(balance + head.to(tl.int64) * D + c, mask=there & (c < D), other=1.0)
                v = v.to(tl.float32) * factor.to(tl.float32)[None]
            loaded += (v,)
        lows = ()
        highs = ()
        for field in tl.static_range(FIELDS):
            v = loaded[field].to(tl.float32)
            if UNITS == S and UNIT == U and D == FIELDS * B:
                lows += (tl.min(v, 2),)
                highs += (tl.max(v, 2),)
            else:
                inside = (there & (field * B + j < D))[None]
                lows += (tl.min(tl.where(inside, v, float("inf")), 2),)
                highs += (tl.max(tl.where(inside, v, float("-inf")), 2),)
        scale_at = (begin + row) * GROUPS
        packed = tl.zeros([ROWS, S, U], tl.int32)
        if UNIT != GROUP:  # groups of several units: bring them together
            merged_lows = lows
            merged_highs = highs
            for group in tl.static_range(GROUPS):
                low = tl.full([ROWS], float("inf"), tl.float32)
                high = tl.full([ROWS], float("-inf"), tl.float32)
                for field in tl.static_range(FIELDS):
                    own = ((field * B + s * UNIT) // GROUP == group) & (s < UNITS)
                    low = tl.minimum(low, tl.min(tl.where(own[None, :], lows[field], float("inf")), 1))
                    high = tl.maximum(high, tl.max(tl.where(own[None, :], highs[field], float("-inf")), 1))
                given_lows = ()
                given_highs = ()
                for field in tl.static_range(FIELDS):
                    own = ((field * B + s * UNIT) // GROUP == group)[None, :]
                    given_lows += (tl.where(own, low[:, None], merged_lows[field]),)
                    given_highs += (tl.where(own, high[:, None], merged_highs[field]),)
                merged_lows = given_lows
                merged_highs = given_highs
            lows = merged_lows
            highs = merged_highs
        for field in tl.static_range(FIELDS):
            scale, zero, step, inverse, bottom = _levels(lows[field], highs[field], STEPS, INTERPRET)
            begun = field * B + s * UNIT
            group = begun // GROUP
            # The unit in which a group begins leaves its scale.
            opens = (s < UNITS) & (begun % GROUP == 0) & (group < GROUPS)
            at = scale_at[:, None] + group[None, :]
            tl.store(scales + at, scale, mask=real[:, None] & opens[None, :])
            tl.store(zeros + at, zero, mask=real[:, None] & opens[None, :])
            v = loaded[field].to(tl.float32)
            code = _coded(v, step[:, :, None], inverse[:, :, None], bottom[:, :, None], STEPS, INTERPRET)
            if D != FIELDS * B:
                code = tl.where((field * B + j < D)[None], code, 0)
            packed += code << (field * BITS)
        out = codes + (begin + row)[:, None, None] * B + j[None]
        tl.store(out, packed.to(tl.uint8), mask=real[:, None, None] & there[None])


_INTERPRET = isinstance(_channels, InterpretedFunction)


def _units(width: int, bits: int, group: int) -> dict[str, int]:
    """How rows of `width` codes are cut, for `_tokens` and `_back_tokens`."""
    per_row = -(-width * bits // 8)
    if group >= width:  # one group, however wide
        group, unit = per_row * 8 // bits, per_row
    else:
        unit = gcd(per_row, group)
    count, padded, unit_padded = per_row // unit, triton.next_power_of_2(per_row // unit), triton.next_power_of_2(unit)
    rows = max(TILE // (padded * unit_padded * 8 // bits), 1)
    sizes = {"D": width, "B": per_row, "GROUP": group, "GROUPS": -(-width // group), "UNIT": unit, "U": unit_padded}
    return {**sizes, "UNITS": count, "S": padded, "ROWS": rows, "BITS": bits}


def _blocks(width: int, bits: int, group: int) -> tuple[dict[str, int], int]:
    """How groups of rows are cut, for `_channels` and `_back_channels`, and into how many parts along the channels."""
    per_row = -(-width * bits // 8)
    rows = triton.next_power_of_2(group)
    cols = min(triton.next_power_of_2(per_row), max(TILE // (rows * 8 // bits), 16))
    sizes = {"D": width, "B": per_row, "COLS": cols, "GROUP": group, "G": rows, "BITS": bits}
    return sizes, triton.cdiv(per_row, cols)


def quantise_rows(
    x: Tensor, bits: int, group: int, axis: Axis, *, chosen: Kept | None = None, balance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `workbench_kernels.building.quantise_rows`."""
    x = _whole(x)
    heads, tokens, width = x.shape
    pointers, total, longest = _chosen(chosen, x)
    scales = (total // group, width) if axis == "channel" else (total, -(-width // group))
    codes = torch.empty(total, -(-width * bits // 8), dtype=torch.uint8, device=x.device)
    scale = torch.empty(scales, dtype=torch.float16, device=x.device)
    zero = torch.empty_like(scale)
    if not total or not width:
        return codes, scale, zero
    inputs = (*pointers, x, x.stride(0), x.stride(1), tokens, None if balance is None else balance.contiguous())
    flags = {"CHOSEN": chosen is not None, "BALANCED": balance is not None, "INTERPRET": _INTERPRET}
    # Products are rounded before anything is taken from them, as the reference does.
    options = {} if _INTERPRET else {"enable_fp_fusion": False}
    if axis == "channel":
        sizes, parts = _blocks(width, bits, group)
        grid = (longest // group, parts, heads)
        _channels[grid](*inputs, codes, scale, zero, **sizes, **flags, **options)
    else:
        sizes = _units(width, bits, group)
        grid = (triton.cdiv(longest, sizes["ROWS"]), heads)
        _tokens[grid](*inputs, codes, scale, zero, **sizes, **flags, **options)
    return codes, scale, zero


# -- and back


@triton.jit
def _level(packed, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The codes in bits SHIFT and up of bytes (int32), as float32."""
    bits = ((packed >> SHIFT) & (2**BITS - 1)) | 0x4B000000  # 2 ** 23 + code
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _back_channels(
    codes, scales, zeros, balance, owners, out, t,
    D: tl.constexpr, B: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr,
    BALANCED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, G)
    row = group * GROUP + r
    real = (r < GROUP) & (row < t)
    j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    packed = tl.load(codes + row[:, None] * B + j[None, :], mask=real[:, None] & (j < B)[None, :], other=0).to(tl.int32)
    if BALANCED:
        owner = tl.load(owners + row, mask=real, other=0).to(tl.int64)
    for field in tl.static_range(8 // BITS):
        c = field * B + j
        inside = (j < B) & (c < D)
        scale = tl.load(scales + group * D + c, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group * D + c, mask=inside, other=0.0).to(tl.float32)
        mask = real[:, None] & inside[None, :]
        x = _level(packed, field * BITS, BITS) * scale[None, :] + zero[None, :]
        if BALANCED:
            x = tl.div_rn(x, tl.load(balance + owner[:, None] * D + c[None, :], mask=mask, other=1.0).to(tl.float32))
        tl.store(out + row[:, None] * D + c[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _back_tokens(
    codes, scales, zeros, balance, owners, out, t,
    D: tl.constexpr, B: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, UNIT: tl.constexpr, U: tl.constexpr,
    UNITS: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < t
    s, u = tl.arange(0, S), tl.arange(0, U)
    j = s[:, None] * UNIT + u[None, :]
    there = (s < UNITS)[:, None] & (u < UNIT)[None, :]
    at = codes + row[:, None, None] * B + j[None]
    packed = tl.load(at, mask=real[:, None, None] & there[None], other=0).to(tl.int32)
    if BALANCED:
        owner = tl.load(owners + row, mask=real, other=0).to(tl.int64)
    for field in tl.static_range(8 // BITS):
        c = field * B + j
        group = (field * B + s * UNIT) // GROUP
        given = real[:, None] & ((s < UNITS) & (group < GROUPS))[None, :]
        scale = tl.load(scales + row[:, None] * GROUPS + group[None, :], mask=given, other=0.0).to(tl.float32)
        zero = tl.load(zeros + row[:, None] * GROUPS + group[None, :], mask=given, other=0.0).to(tl.float32)
        mask = real[:, None, None] & (there & (c < D))[None]
        x = _level(packed, field * BITS, BITS) * scale[:, :, None] + zero[:, :, None]
        if BALANCED:
            factor = tl.load(balance + owner[:, None, None] * D + c[None], mask=mask, other=1.0)
            x = tl.div_rn(x, factor.to(tl.float32))
        tl.store(out + row[:, None, None] * D + c[None], x.to(out.dtype.element_ty), mask=mask)


def dequantise_rows(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, axis: Axis, channels: int, dtype: torch.dtype,
    *, balance: Tensor | None = None, owners: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `workbench_kernels.building.dequantise_rows`."""
    total = codes.shape[0]
    out = torch.empty(total, channels, dtype=dtype, device=codes.device)
    if not total or not channels:
        return out
    balance = None if balance is None else balance.contiguous()
    inputs = (codes.contiguous(), scale.contiguous(), zero.contiguous(), balance, owners, out, total)
    if axis == "channel":
        sizes, parts = _blocks(channels, bits, group)
        _back_channels[(triton.cdiv(total, group), parts)](*inputs, **sizes, BALANCED=balance is not None)
    else:
        sizes = _units(channels, bits, group)
        _back_tokens[(triton.cdiv(total, sizes["ROWS"]),)](*inputs, **sizes, BALANCED=balance is not None)
    return out


# -- sparse rows


@triton.jit
def _sparse(
    places, starts, begins, lengths, x, x_head, x_row, n, numbers, bitmap, count,
    D: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, ROWS: tl.constexpr, KEY_BITS: tl.constexpr,
    CHOSEN: tl.constexpr,
):  # fmt: skip
    """Some rows: the threshold by bisection over the bits of a magnitude, then a sum along the row for the places."""
    SLOTS: tl.constexpr = 8 * BP
    head = tl.program_id(1)
    first = tl.program_id(0) * ROWS
    start, begin, length = _span(starts, begins, lengths, n, head, CHOSEN)
    if first < length:
        row = first + tl.arange(0, ROWS)
        real = row < length
        place = _places(places, start, row, real, CHOSEN).to(tl.int64)
        slot = tl.arange(0, SLOTS)
        c = slot % 8 * B + slot // 8  # in the order of the bits, byte after byte
        inside = (c < D) & (slot // 8 < B)
        mask = real[:, None] & inside[None, :]
        v = tl.load((x + head.to(tl.int64) * x_head + place * x_row)[:, None] + c[None, :], mask=mask, other=0.0)
        if KEY_BITS == 31:
            key = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        else:
            key = v.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
        if SLOTS != D:
            key = tl.where(inside[None, :], key, -1)
        # The largest threshold that at least `count` magnitudes reach, from its highest bit to its lowest.
        reached = tl.zeros([ROWS], tl.int32)
        for step in range(KEY_BITS):
            trial = reached | (1 << (KEY_BITS - 1 - step))
            enough = tl.sum((key >= trial[:, None]).to(tl.int32), 1) >= count
            reached = tl.where(enough, trial, reached)
        above = (key > reached[:, None]).to(tl.int32)
        equal = (key == reached[:, None]).to(tl.int32)
        both = tl.cumsum(above + (equal << 16), 1)
        missing = count - tl.sum(above, 1)
        ties = both >> 16
        chosen = (above != 0) | ((equal != 0) & (ties <= missing[:, None]))
        to = (both & 0xFFFF) + tl.minimum(ties, missing[:, None]) - 1
        at = begin + row
        tl.store(
            numbers + at[:, None] * count + to, v.to(numbers.dtype.element_ty), mask=real[:, None] & chosen
        )  # fmt: skip
        bits = tl.reshape(chosen.to(tl.int32), (ROWS, BP, 8)) << tl.arange(0, 8)[None, None, :]
        j = tl.arange(0, BP)
        out = bitmap + at[:, None] * B + j[None, :]
        tl.store(out, tl.sum(bits, 2).to(tl.uint8), mask=real[:, None] & (j < B)[None, :])


@triton.jit
def _expand(
    numbers, bitmap, out, t, count, D: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, 8 * BP)
    j, field = slot // 8, slot % 8  # in the order of the bits, byte after byte
    c = field * B + j
    mask = (row < t)[:, None] & ((c < D) & (j < B))[None, :]
    byte = tl.load(bitmap + row[:, None] * B + j[None, :], mask=mask, other=0).to(tl.int32)
    bit = (byte >> field[None, :]) & 1
    place = tl.cumsum(bit, 1) - 1
    x = tl.load(numbers + row[:, None] * count + place, mask=bit != 0, other=0.0)
    tl.store(out + row[:, None] * D + c[None, :], x.to(out.dtype.element_ty), mask=mask)


def _slots(width: int, tile: int) -> dict[str, int]:
    per_row = -(-width // 8)
    padded = triton.next_power_of_2(per_row)
    return {"D": width, "B": per_row, "BP": padded, "ROWS": max(tile // (8 * padded), 1)}


def sparse_rows(x: Tensor, count: int, dtype: torch.dtype, *, chosen: Kept | None = None) -> tuple[Tensor, Tensor]:
    """See `workbench_kernels.building.sparse_rows`."""
    x = _whole(x)
    pointers, total, longest = _chosen(chosen, x)
    sizes = _slots(x.shape[2], TILE // 4)
    numbers = torch.empty(total, count, dtype=dtype, device=x.device)
    bitmap = torch.empty(total, sizes["B"], dtype=torch.uint8, device=x.device)
    if total and sizes["B"]:
        _sparse[(triton.cdiv(longest, sizes["ROWS"]), len(x))](
            *pointers, x, x.stride(0), x.stride(1), x.shape[1], numbers, bitmap, count,
            **sizes, KEY_BITS=_KEY_BITS[x.dtype], CHOSEN=chosen is not None,
        )  # fmt: skip
    return numbers, bitmap


def expand_rows(numbers: Tensor, bitmap: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """See `workbench_kernels.building.expand_rows`."""
    total, count = numbers.shape
    out = torch.empty(total, width, dtype=dtype, device=numbers.device)
    sizes = _slots(width, TILE // 2)
    if total and width:
        grid = (triton.cdiv(total, sizes["ROWS"]),)
        _expand[grid](numbers.contiguous(), bitmap.contiguous(), out, total, count, **sizes)
    return out
