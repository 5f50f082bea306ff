"""Decode attention over sparse rows (numbers and a bitmap of where they stand), which are never written out.

Byte b of a row's bitmap of B bytes has bit i for channel b + B * i, and the row's numbers are in the order of these
bits, byte after byte. So one thread unrolls one byte from a place known beforehand: for each bit in turn a number, if
it is set, and the next place. Bits number i of all bytes are neighbouring channels: they make an operand of the matrix
units, with the channels of keys along its rows, those of values along its columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import (
    LOG2E,
    LOWEST,
    Slots,
    at,
    capped,
    interpreted,
    join,
    leave_sums,
    leave_weights,
    power,
    programs_for,
    rows_of,
    run_of,
    spans_of,
    tiles_of,
)
from workbench_kernels.rows import Ragged, SparseRows


def _unroll_code(wide: bool) -> str:
    """PTX that unrolls two bytes, $8 and $9, whose numbers begin at addresses $10 and $11: bit i gives $i, the number
    of the first in its lower half, that of the second in its upper, zero where no bit is set.

    wide: addresses may pass a multiple of 4 GiB. Otherwise their upper halves stay, which spares an addition.
    """
    lines = ["{ .reg .pred p, q; .reg .b32 x, y, t, l, m, h, k; .reg .b64 a, b;"]
    lines.append("mov.b64 a, $10; mov.b64 b, $11; mov.b64 {l, h}, a; mov.b64 {m, k}, b;")
    for i in range(8):
        for is_set, number, place, low, high, byte in (
            ("p", "x", "a", "l", "h", "$8"),
            ("q", "y", "b", "m", "k", "$9"),
        ):
            lines.append(f"and.b32 t, {byte}, {1 << i}; setp.ne.u32 {is_set}, t, 0; mov.b32 {number}, 0;")
            lines.append(f"@{is_set} ld.global.nc.u16 {number}, [{place}];")
            if i < 7 and wide:
                lines.append(f"@{is_set} add.s64 {place}, {place}, 2;")
            elif i < 7:
                moved = f"shl.b32 t, t, {1 - i};" if i < 2 else f"shr.u32 t, t, {i - 1};"
                lines.append(f"{moved} add.u32 {low}, {low}, t; mov.b64 {place}, {{{low}, {high}}};")
        lines.append(f"prmt.b32 ${i}, x, y, 0x5410;")
    return " ".join(lines) + " }"


_UNROLL = tl.constexpr(_unroll_code(wide=False))
_UNROLL_WIDE = tl.constexpr(_unroll_code(wide=True))
_OUTPUTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,l,l")


@triton.jit
def _popcount(word, INTERPRET: tl.constexpr):
    """How many bits of int32 words are set."""
    if INTERPRET:
        word = word.to(tl.uint32, bitcast=True)
        word = word - ((word >> 1) & 0x55555555)
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        return ((word * 0x01010101) >> 24).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _before(word, byte, FIRST: tl.constexpr, INTERPRET: tl.constexpr):
    """Bits set in a word of a row, that of its bytes FIRST .. FIRST + 3, before byte number `byte`."""
    mask = tl.where(byte >= FIRST + 4, -1, (1 << (8 * (tl.maximum(tl.minimum(byte, FIRST + 3), FIRST) - FIRST))) - 1)
    return _popcount(word & mask, INTERPRET)


@triton.jit
def _unrolled(
    numbers, bitmap, row, byte, axis: tl.constexpr, C: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Eight tensors of what rows [G, N] hold, number i at channels byte + B * i.

    [G, N, BP] each for axis 2, [G, BP, N] for axis 1.     byte: 0 .. BP - 1, of a shape that broadcasts.
    """
    each = tl.expand_dims(row, axis)
    if B == BP:
        bits = tl.load(bitmap + (each * B + byte)).to(tl.int32)
    else:
        bits = tl.load(bitmap + (each * B + byte), mask=byte < B, other=0).to(tl.int32)
    if B % 8 == 0:
        before = tl.zeros([1, 1, 1], tl.int32)
        for j in tl.static_range(B // 8):
            pair = tl.expand_dims(tl.load(bitmap.to(tl.pointer_type(tl.int64)) + (row * (B // 8) + j)), axis)
            before = before + _before(pair.to(tl.int32), byte, 8 * j, INTERPRET)
            before = before + _before((pair >> 32).to(tl.int32), byte, 8 * j + 4, INTERPRET)
    else:
        count = _popcount(bits, INTERPRET)
        before = tl.cumsum(count, axis) - count
    place = numbers + (each * C + before)
    if INTERPRET:
        found = ()
        for i in tl.static_range(8):
            there = (bits >> i) & 1
            found = found + (tl.load(place, mask=there != 0, other=0.0),)
            place += there
        return found
    else:
        words = tl.inline_asm_elementwise(
            _UNROLL_WIDE if WIDE else _UNROLL, _OUTPUTS, [bits, place.to(tl.int64)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
        found = ()
        for i in tl.static_range(8):
            found = found + (words[i].to(numbers.dtype.element_ty, bitcast=True),)
        return found


@triton.jit
def _seen(
    row, length, positions, where, before, MASKED: tl.constexpr, PLACED: tl.constexpr
):  # fmt: skip
    """Which rows [G, N] of a head exist, and queries at `where` [R] see: [G, N, 1 or R].

    Row i is the head's entry before + i.
    """
    seen = (row < length)[:, :, None]
    if MASKED:
        if PLACED:
            place = tl.load(positions + before + row, mask=row < length, other=0)
        else:
            place = before + row
        seen = seen & (place[:, :, None] <= where[None, None, :])
    return seen


@triton.jit
def _whole_rows(
    query, head, rows, first, step, length, front, keys, values, positions, where, scale, softcap,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, PLACED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attention over rows first, first + 1 .. of each `step` of a head's `length` whole rows, which follow `front`
    sparse ones. Returns largest score and sum of weights [G, R], and sums [G, DVP, R].
    """
    g, t, d, dv = tl.arange(0, G), tl.arange(0, N), tl.arange(0, DP), tl.arange(0, DVP)
    within = g[:, None] * N + t[None, :]
    asked = tl.load(
        query + ((head * ROWS + rows)[None, :] * D + d[:, None]),
        mask=(rows < ROWS)[None, :] & (d < D)[:, None], other=0.0,
    )  # fmt: skip
    asked = tl.broadcast_to(asked[None], [G, DP, R])
    top = tl.full([G, R], LOWEST, tl.float32)
    whole = tl.zeros([G, R], tl.float32)
    mixed = tl.zeros([G, DVP, R], tl.float32)
    for begin in tl.range(first, length, step, num_stages=1):
        row = begin + within
        there = row < length
        key = tl.load(
            keys + (row[:, :, None] * D + d[None, None, :]),
            mask=there[:, :, None] & (d < D)[None, None, :], other=0.0,
        )  # fmt: skip
        score = capped(tl.dot(key, asked) * scale, softcap, SOFTCAP)
        score = tl.where(_seen(row, length, positions, where, front, MASKED, PLACED), score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None, :])
        old = tl.exp2(top - higher)
        whole = whole * old + tl.sum(weight, 1)
        value = tl.load(
            values + (row[:, None, :] * DV + dv[None, :, None]),
            mask=there[:, None, :] & (dv < DV)[None, :, None], other=0.0,
        )  # fmt: skip
        mixed = tl.dot(value, weight.to(value.dtype), mixed * old[:, None, :])
        top = higher
    return top, whole, mixed


@triton.jit
def _attend(
    query, asked_at, positions, position_starts,
    key_numbers, key_bitmap, key_starts, key_bitmap_starts, lengths, key_tail, key_tail_starts, tail_lengths,
    value_numbers, value_bitmap, value_starts, value_bitmap_starts, value_tail, value_tail_starts,
    sums, largest, weights, scale, softcap, queries, programs,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, C: tl.constexpr, VC: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
    VB: tl.constexpr, VBP: tl.constexpr, G: tl.constexpr, N: tl.constexpr, RESTS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, PLACED: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A run of tiles of G * N sparse rows or, in the first RESTS programs of every head, a part of its whole rows. As
    in `dense`, each warp has rows and a softmax of its own (the dimension G).
    """
    TILE: tl.constexpr = G * N
    pid = tl.program_id(0) - K * RESTS
    rows = tl.program_id(1) * R + tl.arange(0, R)
    g, t = tl.arange(0, G), tl.arange(0, N)
    b, vb, dv = tl.arange(0, BP), tl.arange(0, VBP), tl.arange(0, DVP)
    within = g[:, None] * N + t[None, :]  # [G, N]
    where = rows
    if MASKED:
        where = tl.load(asked_at + rows % queries, mask=rows < ROWS, other=0)
    if pid < 0:
        head = (pid + K * RESTS) // RESTS
        which = (pid + K * RESTS) % RESTS
        place_at = lengths
        if PLACED:
            place_at = positions + tl.load(position_starts + head).to(tl.int64)
        top, whole, mixed = _whole_rows(
            query, head, rows, which * (G * 16), RESTS * (G * 16), tl.load(tail_lengths + head),
            tl.load(lengths + head), key_tail + tl.load(key_tail_starts + head).to(tl.int64) * D,
            value_tail + tl.load(value_tail_starts + head).to(tl.int64) * DV, place_at, where, scale, softcap,
            ROWS, R, D, DP, DV, DVP, G, 16, MASKED, PLACED, SOFTCAP,
        )  # fmt: skip
        slot = programs + K + head * RESTS + which
        leave_sums(sums, slot, rows, mixed, dv, dv < DV, ROWS, DV, G)
        leave_weights(largest, weights, slot, rows, top, whole, ROWS, G)
    else:
        spans = spans_of(lengths, None, K, KP, TILE, 0)
        tiles, ends = tiles_of(spans, TILE)
        low, high = run_of(tl.sum(tiles, 0), pid, programs)
        while low < high:
            head = tl.sum((ends <= low).to(tl.int32), 0)
            begin = at(ends - tiles, head, KP)
            stop = tl.minimum(high, at(ends, head, KP))
            length = at(spans, head, KP)
            number_at = key_numbers + tl.load(key_starts + head).to(tl.int64) * C
            bits_at = key_bitmap + tl.load(key_bitmap_starts + head).to(tl.int64) * B
            value_number_at = value_numbers + tl.load(value_starts + head).to(tl.int64) * VC
            value_bits_at = value_bitmap + tl.load(value_bitmap_starts + head).to(tl.int64) * VB
            place_at = lengths
            if PLACED:
                place_at = positions + tl.load(position_starts + head).to(tl.int64)
            asked = ()
            for i in tl.static_range(8):
                channel = b + B * i
                some = tl.load(
                    query + ((head * ROWS + rows)[None, :] * D + channel[:, None]),
                    mask=(rows < ROWS)[None, :] & ((b < B) & (channel < D))[:, None], other=0.0,
                )  # fmt: skip
                asked = asked + (tl.broadcast_to(some[None], [G, BP, R]),)
            mixed = ()
            for i in tl.static_range(8):
                mixed = mixed + (tl.zeros([G, VBP, R], tl.float32),)
            top = tl.full([G, R], LOWEST, tl.float32)
            whole = tl.zeros([G, R], tl.float32)
            for tile in tl.range(low - begin, stop - begin, num_stages=STAGES):
                first = tl.cast(tile * TILE, tl.int64)
                # Rows beyond the end read the last row, and are hidden.
                row = tl.minimum(within, length - 1 - tile * TILE)
                key = _unrolled(
                    number_at + first * C, bits_at + first * B, row, b[None, None, :], 2, C, B, BP, WIDE, INTERPRET
                )
                score = tl.zeros([G, N, R], tl.float32)
                for i in tl.static_range(8):
                    score = tl.dot(key[i], asked[i], score)
                score = capped(score * scale, softcap, SOFTCAP)
                seen = _seen(within + tile * TILE, length, place_at, where, 0, MASKED, PLACED)
                score = tl.where(seen, score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None, :])
                old = tl.exp2(top - higher)
                whole = whole * old + tl.sum(weight, 1)
                share = weight.to(value_numbers.dtype.element_ty)
                value = _unrolled(
                    value_number_at + first * VC, value_bits_at + first * VB, row, vb[None, :, None], 1, VC, VB, VBP,
                    WIDE, INTERPRET,
                )  # fmt: skip
                kept = ()
                for i in tl.static_range(8):
                    kept = kept + (tl.dot(value[i], share, mixed[i] * old[:, None, :]),)
                mixed = kept
                top = higher
            for i in tl.static_range(8):
                channel = vb + VB * i
                leave_sums(sums, pid + head, rows, mixed[i], channel, (vb < VB) & (channel < DV), ROWS, DV, G)
            leave_weights(largest, weights, pid + head, rows, top, whole, ROWS, G)
            low = stop


class Config(NamedTuple):
    """How a program works: warps, rows a warp takes at once, stages of the load pipeline, programs a processor."""

    warps: int
    tokens: int
    stages: int
    per_processor: int


DEFAULT = Config(4, 16, 2, 3)


def decode_bitmap(
    query: Tensor,
    keys: SparseRows,
    values: SparseRows,
    *,
    scale: float,
    softcap: float | None = None,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
    config: Config = DEFAULT,
) -> tuple[Tensor, Tensor | None]:
    """See `workbench_kernels.decode_bitmap.decode_bitmap`."""
    heads, lengths = keys.numbers.starts.numel(), keys.numbers.lengths
    width, value_width = keys.tail.data.shape[1], values.tail.data.shape[1]
    nbytes, value_nbytes = keys.bitmap.data.shape[1], values.bitmap.data.shape[1]
    rows, block, blocks = rows_of(query, heads)
    warps, tokens, stages, per_processor = config
    tile = warps * tokens
    rests = min(-(-keys.tail.longest // (warps * 16)), 8)
    tiles = heads * -(-keys.numbers.longest // tile)
    programs = programs_for(query.device, tiles, per_processor, blocks, heads * rests)
    slots = Slots.of(programs + heads + heads * rests, warps, rows, value_width, query.device)
    _attend[(programs + heads * rests, blocks)](
        query.contiguous(), query_positions,
        None if positions is None else positions.data, None if positions is None else positions.starts,
        keys.numbers.data, keys.bitmap.data, keys.numbers.starts, keys.bitmap.starts, lengths,
        keys.tail.data, keys.tail.starts, keys.tail.lengths,
        values.numbers.data, values.bitmap.data, values.numbers.starts, values.bitmap.starts,
        values.tail.data, values.tail.starts,
        *slots, scale * LOG2E, (softcap or 0.0) * LOG2E, query.shape[1], programs,
        K=heads, KP=power(heads), ROWS=rows, R=block, D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), C=keys.numbers.data.shape[1], VC=values.numbers.data.shape[1],
        B=nbytes, BP=max(power(nbytes), 16), VB=value_nbytes, VBP=max(power(value_nbytes), 16), G=warps, N=tokens,
        RESTS=rests, STAGES=stages, MASKED=query_positions is not None, PLACED=positions is not None,
        SOFTCAP=softcap is not None, WIDE=_passes_4_gib(keys.numbers.data) or _passes_4_gib(values.numbers.data),
        INTERPRET=interpreted(), num_warps=warps,
    )  # fmt: skip
    return join(slots, lengths, query, value_width, tile=tile, programs=programs, lse=lse, rests=rests)


def _passes_4_gib(x: Tensor) -> bool:
    """Whether the upper halves of the addresses of x differ."""
    return x.data_ptr() >> 32 != (x.data_ptr() + x.nbytes) >> 32
