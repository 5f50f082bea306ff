"""Decode attention over bit-packed rows, which are never written out.

A 16-bit word of codes is read as a matrix element. One AND turns a field of it into a float16 that is exactly the code
times a power of two (a subnormal, which the matrix units multiply exactly), so two codes cost one instruction. Scales
per channel go into the query, once for a group of rows; scales per row into the softmax weights; zeros need one small
product. Nothing else happens per number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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
from workbench_kernels.rows import PackedRows, Ragged
from workbench_kernels.scoring import Scoring

# Scaled numbers are kept where float16 is precise: queries, at most 1, and softmax weights are multiplied by these.
_QUERY_BITS = 6
_WEIGHT_BITS = 8
_SCORE_UNIT = tl.constexpr(2.0 ** (24 - _QUERY_BITS))
_WEIGHT_UNIT = tl.constexpr(2.0**_WEIGHT_BITS)

_HALF16, _BF16, _FP8 = (tl.constexpr(kind) for kind in range(3))  # how scales are held
_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}


@triton.constexpr_function
def _bit(piece, bits):
    """Where field number `piece` of a word begins once it has been moved to where a float16 has its fraction."""
    start = (piece % (16 // bits)) * bits
    return start if start + bits <= 10 else start - 8


@triton.constexpr_function
def _query_unit(field, bits):
    """What a query's numbers are multiplied with, so that their products with any field have the same unit."""
    return 2.0 ** (_QUERY_BITS - _bit(field, bits))


@triton.constexpr_function
def _sum_unit(piece, bits):
    """What a field's sums of scaled weights times codes have to be multiplied with."""
    return 2.0 ** (24 - _WEIGHT_BITS - _bit(piece, bits))


@triton.jit
def _field(words, PIECE: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """Field PIECE of int16 words as float16: the code times 2 ** (_bit - 24)."""
    start: tl.constexpr = (PIECE % (16 // BITS)) * BITS
    mask: tl.constexpr = (1 << BITS) - 1
    if start + BITS <= 10:
        if INTERPRET:
            return (words & (mask << start)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            return tl.inline_asm_elementwise(
                f"and.b32 $0, $1, {(mask << start) * 65537};", "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        if INTERPRET:
            return ((words >> 8) & (mask << (start - 8))).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, " + f"{(mask << (start - 8)) * 65537}; " + "}",
                "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip


@triton.jit
def _half(word, WHICH: tl.constexpr):
    """The float16 number WHICH of those that lie in an integer."""
    if WHICH:
        word = word >> (16 * WHICH)
    return word.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _per_row(numbers, begin, row, GROUPS: tl.constexpr, KIND: tl.constexpr):
    """The GROUPS numbers (1, 2 or 4) of each row begin + row, in one integer."""
    NBYTES: tl.constexpr = GROUPS if KIND == _FP8 else 2 * GROUPS
    if NBYTES == 1:
        return tl.load(numbers.to(tl.pointer_type(tl.uint8)) + begin + row)
    elif NBYTES == 2:
        return tl.load(numbers.to(tl.pointer_type(tl.int16)) + begin + row)
    elif NBYTES == 4:
        return tl.load(numbers.to(tl.pointer_type(tl.int32)) + begin + row)
    else:
        return tl.load(numbers.to(tl.pointer_type(tl.int64)) + begin + row)


@triton.jit
def _fp8_number(byte):
    """What positive bytes of float8_e4m3fn stand for, float32: as bits of a float16 they are 2 ** 8 times too small."""
    return ((byte.to(tl.int16) & 127) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _scale_of(word, WHICH: tl.constexpr, KIND: tl.constexpr):
    """The scale WHICH of those that lie in an integer, float32."""
    if KIND == _HALF16:
        return _half(word, WHICH).to(tl.float32)
    elif KIND == _BF16:
        return (((word >> (16 * WHICH)).to(tl.int32) & 65535) << 16).to(tl.float32, bitcast=True)
    else:
        return _fp8_number((word >> (8 * WHICH)) & 127)


@triton.jit
def _numbers(
    codes, scale, zero, tail, balance, row, packed, length, channel,
    D: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHANNEL: tl.constexpr,
    BALANCED: tl.constexpr, MIDDLE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """What rows stand for at channels (of shapes that broadcast), float32; the first `packed` rows are codes."""
    real = (channel < D) & (row < length)
    front = real & (row < packed)
    old = tl.minimum(row, packed - 1).to(tl.int64)
    byte = tl.load(codes + old * B + channel % B, mask=front, other=0).to(tl.int32)
    code = (byte >> ((channel // B) * BITS)) & ((1 << BITS) - 1)
    if CHANNEL:
        group = (old // GROUP) * D + channel
    else:
        group = old * ((D + GROUP - 1) // GROUP) + channel // GROUP
    if KIND == _FP8:
        size = _fp8_number(tl.load(scale.to(tl.pointer_type(tl.uint8)) + group, mask=front, other=0))
    else:
        size = tl.load(scale + group, mask=front, other=0.0).to(tl.float32)
    if MIDDLE:
        found = (code - (1 << (BITS - 1))).to(tl.float32) * size
    else:
        found = code.to(tl.float32) * size + tl.load(zero + group, mask=front, other=0.0).to(tl.float32)
    if BALANCED:
        found = found / tl.load(balance + channel, mask=channel < D, other=1.0).to(tl.float32)
    new = tl.load(tail + (row - packed).to(tl.int64) * D + channel, mask=real & (row >= packed), other=0.0)
    return tl.where(front, found, new.to(tl.float32))


@triton.jit
def _any_rows(
    query, head, rows, first, step, length, key_packed, value_packed,
    key_codes, key_scale, key_zero, key_tail, balance, value_codes, value_scale, value_zero, value_tail,
    value_balance, positions, where, scale, softcap, window,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, BITS: tl.constexpr, VBITS: tl.constexpr,
    GROUP: tl.constexpr, VGROUP: tl.constexpr, CHANNEL: tl.constexpr, VCHANNEL: tl.constexpr, BALANCED: tl.constexpr,
    VBALANCED: tl.constexpr, MIDDLE: tl.constexpr, VMIDDLE: tl.constexpr, KIND: tl.constexpr, VKIND: tl.constexpr,
    MASKED: tl.constexpr, PLACED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attention over rows of a head, packed or not, of any shape, number by number: G * N from `first` on, then those
    `step` further, up to `length`.

    All pointers are the head's own. Returns largest score and sum of weights [G, R], and sums [G, DVP, R].
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
        key = _numbers(
            key_codes, key_scale, key_zero, key_tail, balance, row[:, :, None], key_packed, length, d[None, None, :],
            D, KB, BITS, GROUP, CHANNEL, BALANCED, MIDDLE, KIND,
        ).to(asked.dtype)  # fmt: skip
        score = capped(tl.dot(key, asked) * scale, softcap, SOFTCAP)
        seen = (row < length)[:, :, None]
        if MASKED:
            if PLACED:
                place = tl.load(positions + row, mask=row < length, other=0)
            else:
                place = row
            seen = seen & (place[:, :, None] <= where[None, None, :])
            if WINDOW:
                seen = seen & (place[:, :, None] > where[None, None, :] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None, :])
        old = tl.exp2(top - higher)
        whole = whole * old + tl.sum(weight, 1)
        value = _numbers(
            value_codes, value_scale, value_zero, value_tail, value_balance, row[:, None, :], value_packed, length,
            dv[None, :, None], DV, VB, VBITS, VGROUP, VCHANNEL, VBALANCED, VMIDDLE, VKIND,
        ).to(asked.dtype)  # fmt: skip
        mixed = tl.dot(value, weight.to(asked.dtype), mixed * old[:, None, :])
        top = higher
    return top, whole, mixed


@triton.jit
def _whole_words(
    query, head, rows, front, first, last, slot, words, key_scale, key_zero, balance, value_words, value_scale,
    value_zero, value_balance, sums, largest, weights, scale, softcap,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, G: tl.constexpr,
    SUB: tl.constexpr, N: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr,
    VW: tl.constexpr, VWP: tl.constexpr, BITS: tl.constexpr, VBITS: tl.constexpr, GROUP: tl.constexpr,
    VGROUP: tl.constexpr, CHANNEL: tl.constexpr, VCHANNEL: tl.constexpr, BALANCED: tl.constexpr,
    VBALANCED: tl.constexpr, MIDDLE: tl.constexpr, VMIDDLE: tl.constexpr, KIND: tl.constexpr, VKIND: tl.constexpr,
    STAGES: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attention over tiles first .. last - 1 of the `front` rows of a head that are packed in keys and values, word by
    word, left in a slot. All pointers are the head's own. VCHANNEL: one group holds all values of a channel, so their
    scales wait until the sums are complete.
    """
    TILE: tl.constexpr = G * SUB * N
    VGROUPS: tl.constexpr = 0 if VCHANNEL else DV // VGROUP
    FIELDS: tl.constexpr = 16 // BITS
    VFIELDS: tl.constexpr = 16 // VBITS
    g, t, d = tl.arange(0, G), tl.arange(0, N), tl.arange(0, DP)
    i, vi = tl.arange(0, KWP), tl.arange(0, VWP)
    # Queries, divided by their largest number, in the order of the fields.
    asked = tl.load(
        query + ((head * ROWS + rows)[None, :] * D + d[:, None]),
        mask=(rows < ROWS)[None, :] & (d < D)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    if BALANCED:
        asked = asked / tl.load(balance + d, mask=d < D, other=1.0).to(tl.float32)[:, None]
    size = tl.maximum(tl.max(tl.abs(asked), 0), 1e-30)
    pieces = ()
    for piece in tl.static_range(KB // (2 * KW) * FIELDS):
        channel = (
            (piece % (FIELDS // 2)) * KB + (piece // FIELDS) * (2 * KW) + 2 * i
            + (piece % FIELDS) // (FIELDS // 2)
        )  # fmt: skip
        some = tl.load(
            query + ((head * ROWS + rows)[None, :] * D + channel[:, None]),
            mask=(rows < ROWS)[None, :] & (i < KW)[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        if BALANCED:
            some = some / tl.load(balance + channel, mask=i < KW, other=1.0).to(tl.float32)[:, None]
        some = (some / size[None, :]).to(tl.float16)
        pieces = pieces + (tl.broadcast_to(some[None], [G, KWP, R]),)
    if not CHANNEL:
        sizes = ()  # sums of the query over each group of channels, which the zeros multiply
        for group in tl.static_range(D // GROUP):
            inside = (d >= group * GROUP) & (d < (group + 1) * GROUP)
            sizes = sizes + (tl.sum(tl.where(inside[:, None], asked, 0.0), 0) * scale,)
    mixed = ()
    for piece in tl.static_range(VB // (2 * VW) * VFIELDS):
        mixed = mixed + (tl.zeros([G, VWP, R], tl.float32),)
    zeros = ()
    for group in tl.static_range(VGROUPS):
        zeros = zeros + (tl.zeros([G, R], tl.float32),)
    top = tl.full([G, R], LOWEST, tl.float32)
    whole = tl.zeros([G, R], tl.float32)
    pairs = key_scale.to(tl.pointer_type(tl.int32))
    zero_pairs = key_zero.to(tl.pointer_type(tl.int32))
    by_code = size * scale * _SCORE_UNIT
    by_zero = size * scale
    inside = (g * (SUB * N))[:, None] + t[None, :]  # [G, N]
    for tile in tl.range(first, last, num_stages=STAGES):
        # The last tile of a head begins early enough to be whole; what was seen before is hidden.
        begin = tl.minimum(tile * TILE, front - TILE)
        seen_before = tile * TILE - begin
        raws = ()
        offsets = ()
        for sub in tl.static_range(SUB):
            row = inside + sub * N
            at_words = words + begin.to(tl.int64) * (KB // 2)
            raw = tl.zeros([G, N, R], tl.float32)
            if CHANNEL:
                shift = tl.zeros([G, 16, R], tl.float32)
                group_at = (begin // GROUP).to(tl.int64) * (D // 2)
                group = (((begin % GROUP) + g * (SUB * N) + sub * N) // GROUP)[:, None] * (D // 2)
            else:
                key_scales = _per_row(key_scale, begin.to(tl.int64), row, D // GROUP, KIND)
                if not MIDDLE:
                    key_zeros = _per_row(key_zero, begin.to(tl.int64), row, D // GROUP, KIND)
            for chunk in tl.static_range(KB // (2 * KW)):
                at_word = at_words + (row[:, :, None] * (KB // 2) + (chunk * KW + i)[None, None, :])
                if KW == KWP:
                    word = tl.load(at_word)
                else:
                    word = tl.load(at_word, mask=(i < KW)[None, None, :], other=0)
                for part in tl.static_range(FIELDS // 2):
                    if CHANNEL:
                        at_pair = group_at + (group + (part * (KB // 2) + chunk * KW + i)[None, :])
                        if KW == KWP:
                            pair = tl.load(pairs + at_pair)
                            zero_pair = tl.load(zero_pairs + at_pair)
                        else:
                            pair = tl.load(pairs + at_pair, mask=(i < KW)[None, :], other=0)
                            zero_pair = tl.load(zero_pairs + at_pair, mask=(i < KW)[None, :], other=0)
                    for side in tl.static_range(2):
                        asking = pieces[chunk * FIELDS + side * (FIELDS // 2) + part]
                        code = _field(word, side * (FIELDS // 2) + part, BITS, INTERPRET)
                        if CHANNEL:
                            factor = _half(pair, side) * _query_unit(side * (FIELDS // 2) + part, BITS)
                            raw = tl.dot(code, asking * factor[:, :, None], raw)
                            shift = tl.dot(
                                tl.broadcast_to(_half(zero_pair, side)[:, None, :], [G, 16, KWP]), asking, shift
                            )
                        else:
                            found = tl.dot(code, asking * _query_unit(side * (FIELDS // 2) + part, BITS))
                            factor = _scale_of(key_scales, (part * KB + chunk * 2 * KW) // GROUP, KIND)
                            raw += found * factor[:, :, None]
            if CHANNEL:
                offset = tl.max(shift, 1) * by_zero[None, :]
            else:
                for group in tl.static_range(D // GROUP):
                    if MIDDLE:
                        low = _scale_of(key_scales, group, KIND) * -(2 ** (BITS - 1))
                    else:
                        low = _scale_of(key_zeros, group, KIND)
                    raw += low[:, :, None] * (sizes[group] / by_code)[None, None, :]
                offset = tl.zeros([G, R], tl.float32)
            if SOFTCAP:
                raw = (
                    capped(raw * by_code[None, None, :] + offset[:, None, :], softcap, SOFTCAP) / by_code[None, None, :]
                )
                offset = tl.zeros([G, R], tl.float32)
            real = g * (SUB * N) + sub * N >= seen_before
            raws = raws + (raw,)
            offsets = offsets + (tl.where(real[:, None], offset, float("-inf")),)
        higher = top
        for sub in tl.static_range(SUB):
            higher = tl.maximum(higher, tl.max(raws[sub], 1) * by_code[None, :] + offsets[sub])
        old = tl.exp2(top - higher)
        whole = whole * old
        kept = ()
        for group in tl.static_range(VGROUPS):
            kept = kept + (zeros[group] * old,)
        zeros = kept
        kept = ()
        for piece in tl.static_range(VB // (2 * VW) * VFIELDS):
            kept = kept + (mixed[piece] * old[:, None, :],)
        mixed = kept
        for sub in tl.static_range(SUB):
            row = inside + sub * N
            at_words = value_words + begin.to(tl.int64) * (VB // 2)
            weight = tl.exp2(raws[sub] * by_code[None, None, :] + (offsets[sub] - higher)[:, None, :])
            whole += tl.sum(weight, 1)
            scaled = ()
            if VCHANNEL:
                scaled = scaled + ((weight * _WEIGHT_UNIT).to(tl.float16),)
            else:
                scales = _per_row(value_scale, begin.to(tl.int64), row, VGROUPS, VKIND)
                if not VMIDDLE:
                    shifts = _per_row(value_zero, begin.to(tl.int64), row, VGROUPS, VKIND)
            kept = ()
            for group in tl.static_range(VGROUPS):
                factor = _scale_of(scales, group, VKIND)
                scaled = scaled + ((weight * (factor * _WEIGHT_UNIT)[:, :, None]).to(tl.float16),)
                if VMIDDLE:
                    shift = factor * -(2 ** (VBITS - 1))
                else:
                    shift = _scale_of(shifts, group, VKIND)
                kept = kept + (zeros[group] + tl.sum(weight * shift[:, :, None], 1),)
            zeros = kept
            kept = ()
            for chunk in tl.static_range(VB // (2 * VW)):
                at_word = at_words + (row[:, None, :] * (VB // 2) + (chunk * VW + vi)[None, :, None])
                if VW == VWP:
                    word = tl.load(at_word)
                else:
                    word = tl.load(at_word, mask=(vi < VW)[None, :, None], other=0)
                for field in tl.static_range(VFIELDS):
                    code = _field(word, field, VBITS, INTERPRET)
                    part = scaled[((field % (VFIELDS // 2)) * VB + chunk * 2 * VW) // VGROUP]
                    kept = kept + (tl.dot(code, part, mixed[chunk * VFIELDS + field]),)
            mixed = kept
        top = higher
    for piece in tl.static_range(VB // (2 * VW) * VFIELDS):
        channel = (
            (piece % (VFIELDS // 2)) * VB + (piece // VFIELDS) * (2 * VW) + 2 * vi + (piece % VFIELDS) // (VFIELDS // 2)
        )
        out = mixed[piece] * _sum_unit(piece, VBITS)
        if VCHANNEL:
            size = tl.load(value_scale + channel, mask=vi < VW, other=0.0).to(tl.float32)
            low = tl.load(value_zero + channel, mask=vi < VW, other=0.0).to(tl.float32)
            out = out * size[None, :, None] + whole[:, None, :] * low[None, :, None]
        else:
            out += zeros[((piece % (VFIELDS // 2)) * VB + (piece // VFIELDS) * (2 * VW)) // VGROUP][:, None, :]
        if VBALANCED:
            factor = tl.load(value_balance + channel, mask=vi < VW, other=1.0).to(tl.float32)
            out = out / factor[None, :, None]
        leave_sums(sums, slot, rows, out, channel, vi < VW, ROWS, DV, G)
    leave_weights(largest, weights, slot, rows, top, whole, ROWS, G)


@triton.jit(do_not_specialize=["window", "queries", "programs"])
def _attend(
    query, asked_at, positions, position_starts,
    key_codes, key_code_starts, key_code_lengths, key_scale, key_zero, key_scale_starts, key_tail, key_tail_starts,
    key_tail_lengths, balance,
    value_codes, value_code_starts, value_code_lengths, value_scale, value_zero, value_scale_starts, value_tail,
    value_tail_starts, value_balance, sums, largest, weights, scale, softcap, window, queries, programs,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, G: tl.constexpr, SUB: tl.constexpr, N: tl.constexpr, KB: tl.constexpr,
    VB: tl.constexpr, KW: tl.constexpr, KWP: tl.constexpr, VW: tl.constexpr, VWP: tl.constexpr,
    BITS: tl.constexpr, VBITS: tl.constexpr, GROUP: tl.constexpr, VGROUP: tl.constexpr, CHANNEL: tl.constexpr,
    VCHANNEL: tl.constexpr, BALANCED: tl.constexpr, VBALANCED: tl.constexpr, MIDDLE: tl.constexpr,
    VMIDDLE: tl.constexpr, KIND: tl.constexpr, VKIND: tl.constexpr, FAST: tl.constexpr, RESTS: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr, PLACED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """A run of tiles or, in the first RESTS programs of every head, a part of the head's rest.

    FAST: tiles are of rows whose keys and values are both packed, word by word; KW, VW: the words of a row that are
    taken at once, within which all channels have one group. The rest of each head, and everything where FAST does not
    fit, goes number by number. As in `dense`, each warp has rows and a softmax of its own (the dimension G).
    """
    TILE: tl.constexpr = G * SUB * N
    pid = tl.program_id(0) - K * RESTS  # the rests come first: they are short, but wait long for what they load
    rows = tl.program_id(1) * R + tl.arange(0, R)
    dv = tl.arange(0, DVP)
    where = rows
    if MASKED:
        where = tl.load(asked_at + rows % queries, mask=rows < ROWS, other=0)
    if FAST:
        fronts = spans_of(key_code_lengths, value_code_lengths, K, KP, TILE, N)
    else:
        fronts = spans_of(key_code_lengths, key_tail_lengths, K, KP, TILE, 0)
    tiles, ends = tiles_of(fronts, TILE)
    total = tl.sum(tiles, 0)
    low, high = run_of(total, tl.maximum(pid, 0), programs)
    rest = pid < 0
    if rest:
        low, high = 0, 1
    while low < high:
        # Chosen, not branched to: ptxas 12.8 guards the sum in a branch by a wrong predicate where K fills one warp.
        head = tl.where(rest, (pid + K * RESTS) // max(RESTS, 1), tl.sum((ends <= low).to(tl.int32), 0))
        begin = at(ends - tiles, head, KP)
        stop = tl.minimum(high, at(ends, head, KP))
        packed = tl.load(key_code_lengths + head)
        value_packed = tl.load(value_code_lengths + head)
        length = packed + tl.load(key_tail_lengths + head)
        front = at(fronts, head, KP)
        code_at = tl.load(key_code_starts + head).to(tl.int64) * KB
        value_code_at = tl.load(value_code_starts + head).to(tl.int64) * VB
        if CHANNEL:
            key_groups: tl.constexpr = D
        else:
            key_groups: tl.constexpr = (D + GROUP - 1) // GROUP
        if VCHANNEL:
            value_groups: tl.constexpr = DV
        else:
            value_groups: tl.constexpr = (DV + VGROUP - 1) // VGROUP
        scale_at = tl.load(key_scale_starts + head).to(tl.int64) * key_groups
        value_scale_at = tl.load(value_scale_starts + head).to(tl.int64) * value_groups
        if rest or not FAST:
            if FAST:
                which = (pid + K * RESTS) % RESTS
                first, last, step = front + which * (G * 16), length, RESTS * (G * 16)
                slot = programs + K + head * RESTS + which
            else:
                first, last, step = (low - begin) * TILE, tl.minimum((stop - begin) * TILE, length), G * 16
                slot = pid + head
            if PLACED:
                place_at = positions + tl.load(position_starts + head).to(tl.int64)
            else:
                place_at = key_code_lengths
            top, whole, mixed = _any_rows(
                query, head, rows, first, step, last, packed, value_packed,
                key_codes + code_at, key_scale + scale_at, key_zero + scale_at,
                key_tail + tl.load(key_tail_starts + head).to(tl.int64) * D, balance + head * D,
                value_codes + value_code_at, value_scale + value_scale_at, value_zero + value_scale_at,
                value_tail + tl.load(value_tail_starts + head).to(tl.int64) * DV, value_balance + head * DV,
                place_at, where, scale, softcap, window,
                ROWS, R, D, DP, DV, DVP, G, 16, KB, VB, BITS, VBITS, GROUP, VGROUP, CHANNEL, VCHANNEL, BALANCED,
                VBALANCED, MIDDLE, VMIDDLE, KIND, VKIND, MASKED, PLACED, WINDOW, SOFTCAP,
            )  # fmt: skip
            leave_sums(sums, slot, rows, mixed, dv, dv < DV, ROWS, DV, G)
            leave_weights(largest, weights, slot, rows, top, whole, ROWS, G)
        else:
            _whole_words(
                query, head, rows, front, low - begin, stop - begin, pid + head,
                (key_codes + code_at).to(tl.pointer_type(tl.int16)),
                (key_scale + scale_at), (key_zero + scale_at), balance + head * D,
                (value_codes + value_code_at).to(tl.pointer_type(tl.int16)),
                value_scale + value_scale_at, value_zero + value_scale_at, value_balance + head * DV,
                sums, largest, weights, scale, softcap,
                ROWS, R, D, DP, DV, G, SUB, N, KB, VB, KW, KWP, VW, VWP, BITS, VBITS, GROUP, VGROUP, CHANNEL, VCHANNEL,
                BALANCED, VBALANCED, MIDDLE, VMIDDLE, KIND, VKIND, STAGES, SOFTCAP, INTERPRET,
            )  # fmt: skip
        if rest:
            low = high
        else:
            low = stop


def words_at_once(width: int, bits: int, group: int | None) -> int | None:
    """Words of a row that the fast way takes at once, all channels of a field of which lie in one group of channels.

    group: channels that share a scale, None if each has its own. None where the shape does not fit.
    """
    nbytes, fields = -(-width * bits // 8), 8 // bits
    if width % fields or nbytes % 2 or width % 2:
        return None
    if group is None:
        return nbytes // 2
    piece = min(nbytes, group)
    if width % group or width // group not in (1, 2, 4) or nbytes % piece or group % piece or piece % 2:
        return None
    return piece // 2


class Config(NamedTuple):
    """How a program works: warps; rows of a block, for which the query is scaled once; blocks a warp takes at once;
    stages of the load pipeline; programs a processor; registers a thread may have (None: any number).
    """

    warps: int
    tokens: int
    blocks: int
    stages: int
    per_processor: int
    registers: int | None = None


def config_for(bits: int, group: int) -> Config:
    """What was fastest where it was measured (kernels/bench/decode.py)."""
    if group % 64 or bits == 8:
        return Config(4, 32, 2 if bits == 8 else 1, 2 if bits == 8 else 3, 2)
    return Config(2, 64, 1, 3, 4)


def decode_packed(
    query: Tensor,
    keys: PackedRows,
    values: PackedRows,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `workbench_kernels.decode.decode_packed`."""
    heads = keys.codes.starts.numel()
    width, value_width = keys.tail.data.shape[1], values.tail.data.shape[1]
    rows, block, blocks = rows_of(query, heads)
    per_row, value_per_row = keys.axis == "token", values.axis == "token"
    warps, tokens, subs, stages, per_processor, registers = config or config_for(keys.bits, keys.group)
    key_words = words_at_once(width, keys.bits, keys.group if per_row else None)
    value_words = words_at_once(value_width, values.bits, values.group if value_per_row else None)
    fast = (
        key_words is not None
        and value_words is not None
        and (value_per_row or values.group >= values.codes.longest)
        and (per_row or keys.group % tokens == 0)
        and scoring.window is None
        and keys.codes.longest > 0  # a side that is not quantised leaves nothing to the fast way
        and values.codes.longest > 0
        and _aligned(keys)
        and _aligned(values)
    )
    tile = warps * subs * tokens
    longest = min(keys.codes.longest, values.codes.longest) if fast else keys.longest
    # What is left of a head, if it has a tile at all: no whole block, what only one side has packed, and the newest.
    left = (
        tokens + max(keys.codes.longest, values.codes.longest) - longest + max(keys.tail.longest, values.tail.longest)
    )
    rests = min(-(-left // (warps * 16)), 8) if fast else 0
    programs = programs_for(query.device, heads * -(-longest // tile), per_processor, blocks, heads * rests)
    slots = Slots.of(programs + heads + heads * rests, warps, rows, value_width, query.device)
    key_words, value_words = key_words or 16, value_words or 16
    _attend[(programs + heads * rests, blocks)](
        query.contiguous(), query_positions,
        None if positions is None else positions.data, None if positions is None else positions.starts,
        keys.codes.data, keys.codes.starts, keys.codes.lengths, *_sizes(keys),
        keys.tail.data, keys.tail.starts, keys.tail.lengths, _balance(keys),
        values.codes.data, values.codes.starts, values.codes.lengths, *_sizes(values),
        values.tail.data, values.tail.starts, _balance(values),
        *slots, scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E, scoring.window or 0, query.shape[1],
        programs,
        K=heads, KP=power(heads), ROWS=rows, R=block, D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), G=warps, SUB=subs, N=tokens, KB=keys.codes.data.shape[1],
        VB=values.codes.data.shape[1],
        KW=key_words, KWP=max(power(key_words), 16), VW=value_words, VWP=max(power(value_words), 16),
        BITS=keys.bits, VBITS=values.bits, GROUP=keys.group, VGROUP=values.group, CHANNEL=not per_row,
        VCHANNEL=not value_per_row, BALANCED=keys.balance is not None, VBALANCED=values.balance is not None,
        MIDDLE=keys.zero is None, VMIDDLE=values.zero is None, KIND=_KINDS[keys.scale.data.dtype],
        VKIND=_KINDS[values.scale.data.dtype], FAST=fast, RESTS=rests, STAGES=stages,
        MASKED=query_positions is not None, PLACED=positions is not None, WINDOW=scoring.window is not None,
        SOFTCAP=scoring.softcap is not None, INTERPRET=interpreted(), num_warps=warps,
        maxnreg=registers,
    )  # fmt: skip
    return join(
        slots, keys.codes.lengths, query, value_width, scoring, tile=tile, programs=programs, lse=lse, rests=rests,
        others=values.codes.lengths if fast else keys.tail.lengths, step=tokens if fast else 0,
    )  # fmt: skip


def _aligned(rows: PackedRows) -> bool:
    """Whether words and pairs of numbers begin where they can be loaded whole."""
    scale, zero, _ = _sizes(rows)
    return all(x.data_ptr() % 16 == 0 for x in (rows.codes.data, scale, zero))


def _sizes(rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zeros (scales again where there are none) and where those of each head begin; FP8 as bytes."""
    scale = rows.scale.data
    if scale.dtype == torch.float8_e4m3fn:
        scale = scale.view(torch.uint8)
    return scale, scale if rows.zero is None else rows.zero.data, rows.scale.starts


def _balance(rows: PackedRows) -> Tensor:
    """The factors of its channels, or something in their place."""
    return rows.scale.data.view(torch.uint8) if rows.balance is None else rows.balance
