"""Decode attention over sparse rows (numbers and a bitmap of where they stand), which are never written out.

Byte b of a row's bitmap of B bytes has bit i for channel b + B * i, and the row's numbers are in the order of these
bits, byte after byte. So one thread unrolls one byte from a place known beforehand: for each bit in turn a number, if
it is set, and the next place. Bits number i of all bytes are neighbouring channels: they make an operand of the matrix
units, with the channels of keys along its rows, those of values along its columns.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.bitmap_code import (
    COPY_4,
    COPY_8,
    COPY_16,
    FETCH,
    OUTPUTS,
    PUT,
    UNIT_8,
    UNIT_16,
    UNIT_32,
    UNROLL,
    UNROLL_WIDE,
    constraints,
    room_code,
    window_code,
)
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
from workbench_kernels.scoring import Scoring


@triton.jit
def _room(CODE: tl.constexpr):
    """The address of shared memory."""
    return tl.inline_asm_elementwise(CODE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _nothing():
    """Zero, of which the compiler does not know that it is: what is loaded there is loaded after this."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _together():
    """What lanes of a warp have left in shared memory is seen by all of them."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fronts(tile, length, G: tl.constexpr, N: tl.constexpr):
    """The first row of each warp in a tile of a head of `length` rows, and how many rows it has: [G]."""
    front = tile * (G * N) + tl.arange(0, G) * N
    return front, tl.maximum(tl.minimum(length - front, N), 0)


@triton.jit
def _fetch(numbers, ahead, row, left, C: tl.constexpr, V: tl.constexpr):
    """Up to 4 * V numbers from those of row [G] on, of which `left` [G] rows exist: two words of each four.

    numbers: of row 0, less the `ahead` that precede them in their four. A warp's rows are as far ahead, as N rows are
    whole fours.
    """
    lane = tl.arange(0, 32)[None, :]
    address = (numbers + tl.cast(row, tl.int64) * C).to(tl.int64)[:, None] + 8 * lane
    end = tl.where(left > 0, left * C + ahead, 0)[:, None] - 4 * lane
    found = ()
    for j in tl.static_range((V + 31) // 32):
        some = tl.inline_asm_elementwise(
            FETCH, "=&r,=&r,l,r,r", [address + 256 * j, end, 128 * j],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        found = found + (some[0], some[1])
    return found


@triton.jit
def _put(found, room, V: tl.constexpr):
    """Leave windows of what was fetched: word i of a room holds numbers i - 1 and i."""
    lane = tl.arange(0, 32)[None, :]
    place, before = room[:, None] + 16 * lane, (lane + 31) % 32
    last = found[1]
    for j in tl.static_range((V + 31) // 32):
        last = tl.inline_asm_elementwise(
            PUT, "=&r,r,r,r,r,r,r,r",
            [found[2 * j], found[2 * j + 1], last, before, place + 512 * j, lane, min(V - 32 * j, 32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


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
            UNROLL_WIDE if WIDE else UNROLL, OUTPUTS, [bits, place.to(tl.int64)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=2,
        )  # fmt: skip
        found = ()
        for i in tl.static_range(8):
            found = found + (words[i].to(numbers.dtype.element_ty, bitcast=True),)
        return found


@triton.jit
def _copy(bitmap, row, left, room, N: tl.constexpr, B: tl.constexpr):
    """Begin to copy N rows of a bitmap from row [G] on, of which `left` [G] exist, to rooms [G]; zeros for others."""
    lane = tl.arange(0, 32)[None, :]
    SIZE: tl.constexpr = 16 if B % 16 == 0 else (8 if B % 8 == 0 else 4)
    CODE: tl.constexpr = COPY_16 if SIZE == 16 else (COPY_8 if SIZE == 8 else COPY_4)
    address = (bitmap + tl.cast(row, tl.int64) * B).to(tl.int64)
    for j in tl.static_range((N * B // SIZE + 31) // 32):
        v = lane + 32 * j
        tl.inline_asm_elementwise(
            CODE, "=r,r,l,r,r,r",
            [room[:, None] + SIZE * v, address[:, None] + SIZE * v,
             tl.where(SIZE * v < left[:, None] * B, SIZE, 0), v, N * B // SIZE],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _copied():
    """Wait for this thread's copies."""
    tl.inline_asm_elementwise(
        "cp.async.wait_all; mov.b32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _words(place, B: tl.constexpr):
    """B bytes from each place in `room`, as int32 words."""
    words = ()
    if B % 16 == 0:
        for j in tl.static_range(B // 16):
            some = tl.inline_asm_elementwise(
                "{ .reg .b32 t; mov.u32 t, room; add.u32 t, t, $4; ld.shared.v4.b32 {$0, $1, $2, $3}, [t]; }",
                "=r,=r,=r,=r,r", [place + 16 * j],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            words = words + (some[0], some[1], some[2], some[3])
    elif B % 8 == 0:
        for j in tl.static_range(B // 8):
            some = tl.inline_asm_elementwise(
                "{ .reg .b32 t; mov.u32 t, room; add.u32 t, t, $2; ld.shared.v2.b32 {$0, $1}, [t]; }",
                "=r,=r,r", [place + 8 * j], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            words = words + (some[0], some[1])
    else:
        for j in tl.static_range(B // 4):
            some = tl.inline_asm_elementwise(
                "{ .reg .b32 t; mov.u32 t, room; add.u32 t, t, $1; ld.shared.b32 $0, [t]; }",
                "=r,r", [place + 4 * j], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            words = words + (some,)
    return words


@triton.jit
def _unit_bits(
    bitmap, place, row, there, unit, axis: tl.constexpr, B: tl.constexpr, UP: tl.constexpr, U: tl.constexpr,
    HERE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Bits of units of U bits of rows [G, N] (lowest in a word, others above), none where a row is not there, and how
    many numbers of their row precede them. Rows are of whole words; with HERE they lie in shared memory, at `place`
    [G, N].
    """
    COUNT: tl.constexpr = 8 * B // U
    words = ()
    if HERE:
        words = _words(place, B)
    else:
        for j in tl.static_range(B // 4):
            at = bitmap.to(tl.pointer_type(tl.int32)) + (row * (B // 4) + j)
            words = words + (tl.load(at, mask=there, other=0),)
    byte = unit * (U // 8)
    before = tl.zeros([1, 1, 1], tl.int32)
    bits = tl.expand_dims(words[0], axis)
    for j in tl.static_range(B // 4):
        word = tl.expand_dims(words[j], axis)
        if 4 * j < B - U // 8:
            before = before + _before(word, byte, 4 * j, INTERPRET)
        if not HERE:
            bits = tl.where(byte >= 4 * j, word, bits)
    if HERE:
        CODE: tl.constexpr = UNIT_32 if U == 32 else (UNIT_16 if U == 16 else UNIT_8)
        at = tl.expand_dims(place, axis) + (byte if COUNT == UP else tl.minimum(byte, B - U // 8))
        bits = tl.inline_asm_elementwise(CODE, "=r,r", [at], dtype=tl.int32, is_pure=True, pack=1)
    elif U < 32:
        bits = bits >> (byte % 4 * 8)
    if COUNT != UP:
        bits = tl.where(unit < COUNT, bits, 0)
    return bits, before


@triton.jit
def _unrolled_here(
    numbers, bits, before, place, row, axis: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
    CODE: tl.constexpr, OUTPUTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """What rows [G, N] hold, given bits of units and how many numbers precede them: for axis 2 (keys) U / 4 tensors
    [G, N, UP, 4], the j-th with bits 4 * j .. 4 * j + 3 of each unit; for axis 1 (values) U tensors [G, UP, N], one
    for each bit. Windows of each row begin at `place` [G, N] in shared memory.

    The compiler unrolls in the layout of the matrix units only if nothing but loads and constants lead there: numbers
    from 0 on are therefore loaded, too.
    """
    found = ()
    if INTERPRET:
        place = numbers + (tl.expand_dims(row, axis) * C + before)
        if axis == 2:
            place, bits = place[:, :, :, None], bits[:, :, :, None]
            for j in tl.static_range(U // 4):
                bit = 4 * j + tl.arange(0, 4)[None, None, None, :]
                lower = _popcount(bits & ((1 << bit) - 1), INTERPRET)
                found = found + (tl.load(place + lower, mask=((bits >> bit) & 1) != 0, other=0.0),)
        else:
            for i in tl.static_range(U):
                bit = (bits >> i) & 1
                found = found + (tl.load(place, mask=bit != 0, other=0.0),)
                place += bit
    else:
        place = tl.expand_dims(place, axis) + before * 4
        COUNT: tl.constexpr = U // 4 if axis == 2 else U
        PACK: tl.constexpr = 4 if axis == 2 else 32 // U
        args = (bits, place)
        if axis == 2:  # each of the four alike but for a number, lest the compiler unroll one and spread it
            args = (bits[:, :, :, None], place[:, :, :, None], tl.arange(0, 4)[None, None, None, :])
        if COUNT == 16:
            words = tl.inline_asm_elementwise(
                CODE, OUTPUTS, args,
                dtype=(
                    tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                    tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                ),
                is_pure=True, pack=PACK,
            )  # fmt: skip
        elif COUNT == 8:
            words = tl.inline_asm_elementwise(
                CODE, OUTPUTS, args,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True, pack=PACK,
            )  # fmt: skip
        elif COUNT == 4:
            words = tl.inline_asm_elementwise(
                CODE, OUTPUTS, args, dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=PACK
            )
        else:
            words = tl.inline_asm_elementwise(CODE, OUTPUTS, args, dtype=(tl.int16, tl.int16), is_pure=True, pack=PACK)
        for i in tl.static_range(COUNT):
            found = found + (words[i].to(numbers.dtype.element_ty, bitcast=True),)
    return found


@triton.jit
def _operand(
    found, axis: tl.constexpr, G: tl.constexpr, N: tl.constexpr, UP: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    """One operand of the matrix units of what `_unrolled_here` found. See `_channel`.

    As one, so that the compiler unrolls in the layout that they need.
    """
    parts = found
    COUNT: tl.constexpr = U // 4 if axis == 2 else U
    if COUNT == 16:
        parts = _joined(parts, 8)
    if COUNT >= 8:
        parts = _joined(parts, 4)
    if COUNT >= 4:
        parts = _joined(parts, 2)
    parts = _joined(parts, 1)
    if axis == 2:
        return tl.reshape(tl.permute(tl.reshape(parts[0], (G, N, UP, 4, U // 4)), (0, 1, 4, 2, 3)), (G, N, U * UP))
    else:
        return tl.reshape(tl.permute(tl.reshape(parts[0], (G, UP, N, U)), (0, 3, 1, 2)), (G, U * UP, N))


@triton.jit
def _joined(parts, HALF: tl.constexpr):
    """Twice HALF tensors as HALF, part i beside part HALF + i."""
    both = ()
    for i in tl.static_range(HALF):
        both = both + (tl.join(parts[i], parts[HALF + i]),)
    return both


@triton.jit
def _channel(axis: tl.constexpr, B: tl.constexpr, D: tl.constexpr, UP: tl.constexpr, U: tl.constexpr):
    """Which channels `_operand` holds, and which of them are real, [U * UP]."""
    k = tl.arange(0, U * UP)
    if axis == 2:
        unit, which = k // 4 % UP, k // (4 * UP) * 4 + k % 4
    else:
        unit, which = k % UP, k // UP
    bit = unit * U + which
    channel = bit // 8 + B * (bit % 8)
    return channel, (bit < 8 * B) & (channel < D)


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


@triton.jit(do_not_specialize=["queries", "programs"])
def _attend(
    query, asked_at, positions, position_starts,
    key_numbers, key_bitmap, key_starts, key_bitmap_starts, lengths, key_tail, key_tail_starts, tail_lengths,
    value_numbers, value_bitmap, value_starts, value_bitmap_starts, value_tail, value_tail_starts,
    order, sums, largest, weights, scale, softcap, queries, programs,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, C: tl.constexpr, VC: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
    VB: tl.constexpr, VBP: tl.constexpr, U: tl.constexpr, VU: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, RESTS: tl.constexpr, SHARED: tl.constexpr,
    V: tl.constexpr, VV: tl.constexpr, ROOM: tl.constexpr, KEYS: tl.constexpr, KEYS_OUT: tl.constexpr,
    VALUES: tl.constexpr, VALUES_OUT: tl.constexpr, STRIDE: tl.constexpr,
    MASKED: tl.constexpr, PLACED: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A run of tiles of G * N sparse rows or, in the first RESTS programs of every head, a part of its whole rows. As
    in `dense`, each warp has rows and a softmax of its own (the dimension G).
    """
    TILE: tl.constexpr = G * N
    HERE: tl.constexpr = SHARED and not INTERPRET  # numbers go through shared memory
    COUNT: tl.constexpr = 1 if SHARED else 8  # tensors that hold all channels
    room = tl.arange(0, G) * STRIDE
    if HERE:
        room += _room(ROOM)
    value_room = room + 16 * V
    # Two rooms for bitmaps, for this tile's and the next one's.
    BITS_AT: tl.constexpr = 16 * (V + VV)
    VALUE_BITS_AT: tl.constexpr = BITS_AT + 2 * N * B
    turn = tl.load(order + tl.arange(0, N))[None, :]
    unit, value_unit = tl.load(order + tl.arange(0, BP)), tl.load(order + tl.arange(0, VBP))
    pid = tl.program_id(0) - K * RESTS
    rows = tl.program_id(1) * R + tl.arange(0, R)
    g, t = tl.arange(0, G), tl.arange(0, N)
    b, vb = tl.arange(0, BP), tl.arange(0, VBP)
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
        dv = tl.arange(0, DVP)
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
            if SHARED:
                channel, real = _channel(2, B, D, BP, U)
                some = tl.load(
                    query + ((head * ROWS + rows)[None, :] * D + channel[:, None]),
                    mask=(rows < ROWS)[None, :] & real[:, None], other=0.0,
                )  # fmt: skip
                asked = (tl.broadcast_to(some[None], [G, BP * U, R]),)
            else:
                for i in tl.static_range(8):
                    channel = b + B * i
                    some = tl.load(
                        query + ((head * ROWS + rows)[None, :] * D + channel[:, None]),
                        mask=(rows < ROWS)[None, :] & ((b < B) & (channel < D))[:, None], other=0.0,
                    )  # fmt: skip
                    asked = asked + (tl.broadcast_to(some[None], [G, BP, R]),)
            mixed = ()
            for i in tl.static_range(COUNT):
                mixed = mixed + (tl.zeros([G, VBP * VU // COUNT, R], tl.float32),)
            top = tl.full([G, R], LOWEST, tl.float32)
            if SHARED:
                whole = tl.zeros([G, N, R], tl.float32)  # rows' sums are added up at the end
            else:
                whole = tl.zeros([G, R], tl.float32)
            if HERE:
                ahead = tl.load(key_starts + head) * C & 3
                value_ahead = tl.load(value_starts + head) * VC & 3
                front, left = _fronts(low - begin, length, G, N)
                _copied()
                _together()
                _copy(bits_at, front, left, room + BITS_AT + ((low - begin) & 1) * (N * B), N, B)
                _copy(value_bits_at, front, left, room + VALUE_BITS_AT + ((low - begin) & 1) * (N * VB), N, VB)
                held = _fetch(number_at - ahead, ahead, front, left, C, V)
                others = _fetch(value_number_at - value_ahead, value_ahead, front, left, VC, VV)
            for tile in tl.range(low - begin, stop - begin, num_stages=1 if SHARED else 2):
                first = tl.cast(tile * TILE, tl.int64)
                # Rows beyond the end read the last row, and are hidden.
                row = tl.minimum(within, length - 1 - tile * TILE)
                there = within < length - tile * TILE
                if HERE:
                    _copied()
                    _together()
                    _put(held, room, V)
                    _put(others, value_room, VV)
                    _together()
                    # As one load, for the compiler's sake: see `_unrolled_here`.
                    known = ((tile & 1) * 4 + value_ahead) * 4 + ahead
                    known = tl.load(order + (known * 8 + _nothing() + g[:, None]))
                    front, left = _fronts(tile + 1, length, G, N)
                    _copy(bits_at, front, left, room + BITS_AT + ((tile + 1) & 1) * (N * B), N, B)
                    _copy(value_bits_at, front, left, room + VALUE_BITS_AT + ((tile + 1) & 1) * (N * VB), N, VB)
                    held = _fetch(number_at - ahead, ahead, front, left, C, V)
                    others = _fetch(value_number_at - value_ahead, value_ahead, front, left, VC, VV)
                    place = (known & 7) * STRIDE
                    bits_place = place + (known >> 7) * (N * B) + BITS_AT + turn * B
                    value_bits_place = place + (known >> 7) * (N * VB) + VALUE_BITS_AT + turn * VB
                    value_place = place + (known >> 5 & 3) * 4 + 16 * V + turn * (4 * VC)
                    place += (known >> 3 & 3) * 4 + turn * (4 * C)
                else:
                    place, bits_place, value_place, value_bits_place = within, within, within, within
                if SHARED:
                    bits, before = _unit_bits(
                        bits_at + first * B, bits_place, within, there, unit[None, None, :], 2, B, BP, U, HERE,
                        INTERPRET,
                    )  # fmt: skip
                    value_bits, value_before = _unit_bits(
                        value_bits_at + first * VB, value_bits_place, within, there, value_unit[None, :, None], 1, VB,
                        VBP, VU, HERE, INTERPRET,
                    )  # fmt: skip
                    key = _unrolled_here(
                        number_at + first * C, bits, before, place, within, 2, C, U, KEYS, KEYS_OUT, INTERPRET,
                    )  # fmt: skip
                    key = (_operand(key, 2, G, N, BP, U),)
                else:
                    key = _unrolled(
                        number_at + first * C, bits_at + first * B, row, b[None, None, :], 2, C, B, BP, WIDE, INTERPRET
                    )
                score = tl.zeros([G, N, R], tl.float32)
                for i in tl.static_range(COUNT):
                    score = tl.dot(key[i], asked[i], score)
                score = capped(score * scale, softcap, SOFTCAP)
                seen = _seen(within + tile * TILE, length, place_at, where, 0, MASKED, PLACED)
                score = tl.where(seen, score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                weight = tl.exp2(score - higher[:, None, :])
                old = tl.exp2(top - higher)
                if SHARED:
                    whole = whole * old[:, None, :] + weight
                else:
                    whole = whole * old + tl.sum(weight, 1)
                share = weight.to(value_numbers.dtype.element_ty)
                if SHARED:
                    value = _unrolled_here(
                        value_number_at + first * VC, value_bits, value_before, value_place, within, 1, VC, VU, VALUES,
                        VALUES_OUT, INTERPRET,
                    )  # fmt: skip
                    value = (_operand(value, 1, G, N, VBP, VU),)
                else:
                    value = _unrolled(
                        value_number_at + first * VC, value_bits_at + first * VB, row, vb[None, :, None], 1, VC, VB,
                        VBP, WIDE, INTERPRET,
                    )  # fmt: skip
                kept = ()
                for i in tl.static_range(COUNT):
                    kept = kept + (tl.dot(value[i], share, mixed[i] * old[:, None, :]),)
                mixed = kept
                top = higher
            for i in tl.static_range(COUNT):
                if SHARED:
                    channel, real = _channel(1, VB, DV, VBP, VU)
                else:
                    channel = vb + VB * i
                    real = (vb < VB) & (channel < DV)
                leave_sums(sums, pid + head, rows, mixed[i], channel, real, ROWS, DV, G)
            if SHARED:
                whole = tl.sum(whole, 1)
            leave_weights(largest, weights, pid + head, rows, top, whole, ROWS, G)
            low = stop


class Config(NamedTuple):
    """How a program works: warps (at most 8), rows a warp takes at once (16), and programs a processor."""

    warps: int
    tokens: int
    per_processor: int


DEFAULT = Config(4, 16, 3)
WIDEST = 128  # channels of rows that go through shared memory: at 256 that gave wrong sums on an H100
ROOM_BYTES = 48 << 10  # bytes of shared memory that a program may have, its own and what Triton takes


def decode_bitmap(
    query: Tensor,
    keys: SparseRows,
    values: SparseRows,
    scoring: Scoring,
    *,
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
    warps, tokens, per_processor = config
    per_warp = [-(-(tokens * side.numbers.data.shape[1] + 4) // 4) for side in (keys, values)]
    room = 16 * sum(per_warp) + 2 * tokens * (nbytes + value_nbytes)
    # Triton itself takes what a warp's whole rows need, and for odd widths a little more.
    room_of_all = room + 32 * max(power(width), power(value_width)) + 512
    aligned = all(x.data.data_ptr() % 16 == 0 for side in (keys, values) for x in (side.numbers, side.bitmap))
    words = nbytes % 4 == 0 and value_nbytes % 4 == 0 and max(width, value_width) <= WIDEST
    shared = aligned and words and room_of_all <= ROOM_BYTES
    while shared and warps > 1 and room_of_all * warps > ROOM_BYTES:
        warps, per_processor = warps // 2, per_processor * 2
    if shared and block > 8:
        per_processor = max(per_processor * 2 // 3, 1)  # more registers
    # As many registers as let that many programs run on a multiprocessor.
    limit = {"maxnreg": min((64 << 10) // (32 * warps * per_processor) // 8 * 8, 255)} if shared else {}
    key_unit, value_unit = _units_of(nbytes, value_nbytes, shared)
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
        _order(query.device), *slots, scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E, query.shape[1], programs,
        K=heads, KP=power(heads), ROWS=rows, R=block, D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), C=keys.numbers.data.shape[1], VC=values.numbers.data.shape[1],
        B=nbytes, BP=key_unit[1], VB=value_nbytes, VBP=value_unit[1], U=key_unit[0], VU=value_unit[0],
        G=warps, N=tokens, SHARED=shared, V=per_warp[0], VV=per_warp[1], STRIDE=room, ROOM=room_code(room * warps),
        KEYS=window_code(key_unit[0], True), KEYS_OUT=constraints(key_unit[0] // 2, 12),
        VALUES=window_code(value_unit[0]), VALUES_OUT=constraints(16, 64 // value_unit[0]),
        RESTS=rests, MASKED=query_positions is not None, PLACED=positions is not None,
        SOFTCAP=scoring.softcap is not None,
        WIDE=_passes_4_gib(keys.numbers.data) or _passes_4_gib(values.numbers.data), INTERPRET=interpreted(),
        num_warps=warps, **limit,
    )  # fmt: skip
    return join(slots, lengths, query, value_width, scoring, tile=tile, programs=programs, lse=lse, rests=rests)


@cache
def _order(device: torch.device) -> Tensor:
    """Numbers from 0 on."""
    return torch.arange(1024, dtype=torch.int32, device=device)


def _units_of(nbytes: int, value_nbytes: int, shared: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bits of keys and of values that are unrolled at once, and such units in a row (a power of two).

    From shared memory as large ones as let four lanes share a row of keys, and eight one of values.
    """
    if not shared:
        return (8, max(power(nbytes), 16)), (8, max(power(value_nbytes), 16))
    size = next(size for size in (4, 2, 1) if nbytes // size > 2)
    value_size = 2 if value_nbytes > 8 else 1
    values = max(power(value_nbytes // value_size), 2 if value_size == 1 else 1)
    return (8 * size, max(power(nbytes // size), 4)), (8 * value_size, values)


def _passes_4_gib(x: Tensor) -> bool:
    """Whether the upper halves of the addresses of x differ."""
    return x.data_ptr() >> 32 != (x.data_ptr() + x.nbytes) >> 32
