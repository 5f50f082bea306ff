"""Decode attention over sparse rows (numbers and a bitmap of where they stand), which are never written out.

Byte b of a row's bitmap of B bytes has bit i for channel b + B * i, and the row's numbers are in the order of these
bits, byte after byte. So one thread unrolls one byte from a place known beforehand: it reads the words that hold the
byte's numbers, and takes the next number for each bit that is set. All threads that share a row are neighbours: what
they read lies in one or two lines of the cache. Rows come out with their channels in the order of the bits, which is
as good as any for a sum over channels; queries are read, and outputs written, in that order.
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


def _unroll_code() -> str:
    """PTX that unrolls byte $4, whose numbers begin at address $5: bits 2 i and 2 i + 1 give the halves of $i, each its
    number or zero.

    Three aligned pairs of words hold the numbers of any byte; pairs behind the last, at address $6, are not read. The
    words are moved to where the first number begins; each set bit then takes the lowest number and moves on.
    """
    lines = ["{ .reg .pred p; .reg .b32 r<6>, o, t, n; .reg .b64 a, b;"]
    lines.append("cvt.u32.u64 o, $5; and.b64 a, $5, -8; ld.global.nc.v2.u32 {r0, r1}, [a];")
    for pair in (1, 2):
        first, second = f"r{2 * pair}", f"r{2 * pair + 1}"
        lines.append(f"mov.b32 {first}, 0; mov.b32 {second}, 0; add.s64 b, a, {8 * pair}; setp.le.u64 p, b, $6;")
        lines.append(f"@p ld.global.nc.v2.u32 {{{first}, {second}}}, [b];")
    lines.append("and.b32 t, o, 4; setp.ne.u32 p, t, 0;")
    lines += [f"selp.b32 r{i}, r{i + 1}, r{i}, p;" for i in range(5)]
    lines.append("shl.b32 t, o, 3; and.b32 t, t, 16;")
    lines += [f"shf.r.wrap.b32 r{i}, r{i}, r{i + 1}, t;" for i in range(4)]
    for i in range(8):
        lines.append(f"and.b32 t, $4, {1 << i}; setp.ne.u32 p, t, 0; selp.b32 {'n' if i % 2 == 0 else 't'}, r0, 0, p;")
        words = (8 - i) // 2  # that still hold what comes
        lines += [f"@p shf.r.wrap.b32 r{j}, r{j}, r{j + 1}, 16;" for j in range(words if i < 7 else 0)]
        if i % 2:
            lines.append(f"prmt.b32 ${i // 2}, n, t, 0x5410;")
    return " ".join(lines) + " }"


_UNROLL = tl.constexpr(_unroll_code())
_OUTPUTS = tl.constexpr("=&r,=&r,=&r,=&r,r,l,l")


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
def _rows_of(
    numbers, bitmap, row, last, C: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """What rows [G, N] hold, [G, N, 8 * BP]: number 8 * b + i is that of bit i of byte b, at channel b + B * i.

    last: the last address of eight bytes of the numbers' buffer.
    """
    byte = tl.arange(0, BP)[None, None, :]
    each = row[:, :, None] + tl.zeros([1, 1, BP], tl.int32)
    if B % 8 == 0:
        # Every thread gets its row's whole bitmap, which spares it the others' counts. Loaded row by row, not byte by
        # byte, so that the compiler lays bytes, not rows, along the threads.
        pairs = bitmap.to(tl.pointer_type(tl.int64))
        bits = tl.zeros(each.shape, tl.int32)
        before = tl.zeros(each.shape, tl.int32)
        for j in tl.static_range(B // 8):
            pair = tl.load(pairs + (row * (B // 8) + j))[:, :, None]
            for half in tl.static_range(2):
                word = (pair >> (32 * half)).to(tl.int32)
                before += _before(word, byte, 8 * j + 4 * half, INTERPRET)
                bits = tl.where(byte // 4 == 2 * j + half, word, bits)
        bits = (bits >> (8 * (byte % 4))) & 0xFF
    else:
        bits = tl.load(bitmap + (each * B + byte), mask=byte < B, other=0).to(tl.int32)
        count = _popcount(bits, INTERPRET)
        before = tl.cumsum(count, 2) - count
    if B < BP:
        bits = tl.where(byte < B, bits, 0)
    place = numbers + (each * C + before)
    if INTERPRET:
        f0 = tl.load(place, mask=(bits & 1) != 0, other=0.0)
        f1 = tl.load(place + _popcount(bits & 1, INTERPRET), mask=(bits & 2) != 0, other=0.0)
        f2 = tl.load(place + _popcount(bits & 3, INTERPRET), mask=(bits & 4) != 0, other=0.0)
        f3 = tl.load(place + _popcount(bits & 7, INTERPRET), mask=(bits & 8) != 0, other=0.0)
        f4 = tl.load(place + _popcount(bits & 15, INTERPRET), mask=(bits & 16) != 0, other=0.0)
        f5 = tl.load(place + _popcount(bits & 31, INTERPRET), mask=(bits & 32) != 0, other=0.0)
        f6 = tl.load(place + _popcount(bits & 63, INTERPRET), mask=(bits & 64) != 0, other=0.0)
        f7 = tl.load(place + _popcount(bits & 127, INTERPRET), mask=(bits & 128) != 0, other=0.0)
    else:
        if B < BP:  # a byte that does not exist has no numbers, and no address
            place = tl.where(byte < B, place, numbers)
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _UNROLL, _OUTPUTS, [bits, place.to(tl.int64), last + tl.zeros(each.shape, tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        f0, f1 = w0.to(tl.int16), (w0 >> 16).to(tl.int16)
        f2, f3 = w1.to(tl.int16), (w1 >> 16).to(tl.int16)
        f4, f5 = w2.to(tl.int16), (w2 >> 16).to(tl.int16)
        f6, f7 = w3.to(tl.int16), (w3 >> 16).to(tl.int16)
    # Joins add bits of the number at the end, the last joined the lowest.
    found = tl.join(
        tl.join(tl.join(f0, f4), tl.join(f2, f6)), tl.join(tl.join(f1, f5), tl.join(f3, f7))
    )  # [G, N, BP, 4's bit, 2's bit, 1's bit]
    found = tl.reshape(found, [row.shape[0], row.shape[1], 8 * BP])
    if not INTERPRET:
        found = found.to(numbers.dtype.element_ty, bitcast=True)
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
    last, value_last, sums, largest, weights, scale, softcap, queries, programs,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, C: tl.constexpr, VC: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
    VB: tl.constexpr, VBP: tl.constexpr, G: tl.constexpr, N: tl.constexpr, RESTS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, PLACED: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A run of tiles of G * N sparse rows or, in the first RESTS programs of every head, a part of its whole rows. As
    in `dense`, each warp has rows and a softmax of its own (the dimension G).
    """
    TILE: tl.constexpr = G * N
    pid = tl.program_id(0) - K * RESTS
    rows = tl.program_id(1) * R + tl.arange(0, R)
    g, t = tl.arange(0, G), tl.arange(0, N)
    byte, value_byte, dv = tl.arange(0, 8 * BP) // 8, tl.arange(0, 8 * VBP) // 8, tl.arange(0, DVP)
    channel, value_channel = byte + B * (tl.arange(0, 8 * BP) % 8), value_byte + VB * (tl.arange(0, 8 * VBP) % 8)
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
            asked = tl.load(
                query + ((head * ROWS + rows)[None, :] * D + channel[:, None]),
                mask=(rows < ROWS)[None, :] & ((byte < B) & (channel < D))[:, None], other=0.0,
            )  # fmt: skip
            asked = tl.broadcast_to(asked[None], [G, 8 * BP, R])
            mixed = tl.zeros([G, 8 * VBP, R], tl.float32)
            top = tl.full([G, R], LOWEST, tl.float32)
            whole = tl.zeros([G, R], tl.float32)
            for tile in tl.range(low - begin, stop - begin, num_stages=STAGES):
                first = tl.cast(tile * TILE, tl.int64)
                # Rows beyond the end read the last row, and are hidden.
                row = tl.minimum(within, length - 1 - tile * TILE)
                key = _rows_of(number_at + first * C, bits_at + first * B, row, last, C, B, BP, INTERPRET)
                score = capped(tl.dot(key, asked) * scale, softcap, SOFTCAP)
                seen = _seen(within + tile * TILE, length, place_at, where, 0, MASKED, PLACED)
                score = tl.where(seen, score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None, :])
                old = tl.exp2(top - higher)
                whole = whole * old + tl.sum(weight, 1)
                value = _rows_of(
                    value_number_at + first * VC, value_bits_at + first * VB, row, value_last, VC, VB, VBP, INTERPRET
                )
                mixed = tl.dot(tl.permute(value, (0, 2, 1)), weight.to(value.dtype), mixed * old[:, None, :])
                top = higher
            real = (value_byte < VB) & (value_channel < DV)
            leave_sums(sums, pid + head, rows, mixed, value_channel, real, ROWS, DV, G)
            leave_weights(largest, weights, pid + head, rows, top, whole, ROWS, G)
            low = stop


class Config(NamedTuple):
    """How a program works: warps, rows a warp takes at once, stages of the load pipeline, programs a processor."""

    warps: int
    tokens: int
    stages: int
    per_processor: int


DEFAULT = Config(1, 16, 1, 12)


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
        values.tail.data, values.tail.starts, _last(keys.numbers.data), _last(values.numbers.data),
        *slots, scale * LOG2E, (softcap or 0.0) * LOG2E, query.shape[1], programs,
        K=heads, KP=power(heads), ROWS=rows, R=block, D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), C=keys.numbers.data.shape[1], VC=values.numbers.data.shape[1],
        B=nbytes, BP=max(power(nbytes), 2), VB=value_nbytes, VBP=max(power(value_nbytes), 2), G=warps, N=tokens,
        RESTS=rests, STAGES=stages, MASKED=query_positions is not None, PLACED=positions is not None,
        SOFTCAP=softcap is not None, INTERPRET=interpreted(), num_warps=warps,
    )  # fmt: skip
    return join(slots, lengths, query, value_width, tile=tile, programs=programs, lse=lse, rests=rests)


def _last(x: Tensor) -> int:
    """The address of the last eight bytes, at a multiple of eight, of which some belong to x."""
    return (x.data_ptr() + max(x.nbytes, 1) - 1) // 8 * 8
