"""Decode attention over coefficients of keys that are rotated to their positions once they have left their space."""

from __future__ import annotations

import math
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
    tiles_of,
)
from workbench_kernels.rotary import LOW, RotaryTable
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring


class Config(NamedTuple):
    """How a program works: warps, tokens of a tile (64 or 128), stages of the load pipeline, programs a processor."""

    warps: int
    tokens: int
    stages: int
    per_processor: int


WIDE = Config(4, 64, 2, 1)  # for ranks beyond 128, whose basis and tiles fill a processor's shared memory
# The first is taken: its loop has the fewest instructions a token, and two programs fit into a processor's registers.
CONFIGS = [
    Config(4, 64, 3, 2),
    Config(4, 64, 2, 2),
    Config(4, 64, 4, 2),
    Config(4, 64, 3, 3),
    Config(8, 128, 2, 1),
    Config(8, 128, 3, 1),
    Config(8, 64, 3, 2),
]


@triton.jit
def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _row_of(table, row, d, HALF: tl.constexpr):
    """A row's cosines and sines [HALFP] of table [rows, 2, HALF]; zeros beyond."""
    start = table + row.to(tl.int64) * (2 * HALF) + d
    return tl.load(start, mask=d < HALF, other=0.0), tl.load(start + HALF, mask=d < HALF, other=0.0)


@triton.jit
def _circle(revolutions, EXACT: tl.constexpr):
    """Cosine and sine of so many revolutions, within half a millionth where not EXACT."""
    angle = (revolutions - tl.floor(revolutions + 0.5)) * 6.283185307179586
    if EXACT:
        return tl.cos(angle), tl.sin(angle)
    else:
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=r,r", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=r,r", [angle], tl.float32, True, 1)
        return cos, sin


@triton.jit(do_not_specialize=["queries", "programs", "units", "value_units"])
def _attend(
    query, keys, values, basis, low_table, high_table, frequencies, key_starts, value_starts, lengths, positions,
    position_starts, asked_at, sums, largest, weights, scale, softcap, queries, programs, units, value_units,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, RKP: tl.constexpr, FULL: tl.constexpr,
    UNIT: tl.constexpr, RVP: tl.constexpr, VFULL: tl.constexpr,
    VUNIT: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr, TILE: tl.constexpr,
    COARSE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr, PLACED: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """A run of tiles of TILE rows. Keys leave their space as two halves, the channels of each pair side by side.

    Rotating a key to its position is rotating it from where its tile (or, PLACED, its run) begins, and the query back
    to there. So where rows are their own positions, all tiles rotate keys by the same angles, which stay in registers.
    """
    RK = RKP if FULL else units * UNIT  # a product says how rows are aligned
    RV = RVP if VFULL else value_units * VUNIT
    pid = tl.program_id(0)
    rows = tl.program_id(1) * R + tl.arange(0, R)
    heads, t, d = tl.arange(0, KP), tl.arange(0, TILE), tl.arange(0, HALFP)
    rk, rv = tl.arange(0, RKP), tl.arange(0, RVP)
    spans = tl.load(lengths + heads, mask=heads < K, other=0)
    tiles, ends = tiles_of(spans, TILE)
    total = tl.sum(tiles, 0)
    low, high = run_of(total, pid, programs)
    if MASKED:
        where = tl.load(asked_at + rows % queries, mask=rows < ROWS, other=0)
    if PLACED:
        pace = tl.load(frequencies + d, mask=d < HALF, other=0.0)
    else:
        spot = t[:, None] * (2 * HALF) + d[None, :]
        cos = tl.load(low_table + spot, mask=(d < HALF)[None, :], other=0.0)
        sin = tl.load(low_table + spot + HALF, mask=(d < HALF)[None, :], other=0.0)
        step_cos, step_sin = _row_of(low_table, tl.full([], TILE, tl.int32), d, HALF)
    while low < high:
        head = tl.sum((ends <= low).to(tl.int32), 0)
        begin = at(ends - tiles, head, KP)
        stop = tl.minimum(high, at(ends, head, KP))
        length = at(spans, head, KP)
        key_base = keys + tl.load(key_starts + head).to(tl.int64) * RK
        value_base = values + tl.load(value_starts + head).to(tl.int64) * RV
        basis_at = basis + head.to(tl.int64) * (RK * 2 * HALF) + rk[:, None] * (2 * HALF) + d[None, :]
        in_basis = (rk < RK)[:, None] & (d < HALF)[None, :]
        basis_first = tl.load(basis_at, mask=in_basis, other=0.0)
        basis_second = tl.load(basis_at + HALF, mask=in_basis, other=0.0)
        asked_from = query + (head * ROWS + rows)[None, :] * (2 * HALF) + d[:, None]
        in_query = (rows < ROWS)[None, :] & (d < HALF)[:, None]
        asked_first = tl.load(asked_from, mask=in_query, other=0.0).to(tl.float32)
        asked_second = tl.load(asked_from + HALF, mask=in_query, other=0.0).to(tl.float32)
        start = (low - begin) * TILE
        if PLACED:
            place_base = positions + tl.load(position_starts + head).to(tl.int64)
            start = tl.load(place_base + start)
        fine_cos, fine_sin = _row_of(low_table, start % COARSE, d, HALF)
        wide_cos, wide_sin = _row_of(high_table, start // COARSE, d, HALF)
        cos_start, sin_start = _turned(wide_cos, wide_sin, fine_cos, fine_sin)
        asked_first, asked_second = _turned(asked_first, asked_second, cos_start[:, None], -sin_start[:, None])
        top = tl.full([R], LOWEST, tl.float32)
        whole = tl.zeros([R], tl.float32)
        mixed = tl.zeros([RVP, R], tl.float32)
        for tile in tl.range(low - begin, stop - begin, num_stages=STAGES):
            first = tile * TILE
            # Rows beyond the end read the last row, and are hidden.
            row = tl.minimum(t, length - 1 - first)
            key_at = key_base + first.to(tl.int64) * RK + (row[:, None] * RK + rk[None, :])
            value_at = value_base + first.to(tl.int64) * RV + (row[None, :] * RV + rv[:, None])
            if FULL:
                key = tl.load(key_at)
            else:
                key = tl.load(key_at, mask=(rk < RK)[None, :], other=0.0)
            if PLACED:
                place = tl.load(place_base + first + row)
                tile_cos, tile_sin = _circle((place - start).to(tl.float32)[:, None] * pace[None, :], EXACT)
            else:
                place = first + t
                tile_cos, tile_sin = cos, sin
            one_half, other_half = _turned(tl.dot(key, basis_first), tl.dot(key, basis_second), tile_cos, tile_sin)
            score = tl.dot(one_half.to(key.dtype), asked_first.to(key.dtype))
            score = tl.dot(other_half.to(key.dtype), asked_second.to(key.dtype), score)
            score = capped(score * scale, softcap, SOFTCAP)
            seen = (t < length - first)[:, None]
            if MASKED:
                seen = seen & (place[:, None] <= where[None, :])
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 0))
            weight = tl.exp2(score - higher[None, :])
            old = tl.exp2(top - higher)
            whole = whole * old + tl.sum(weight, 0)
            if VFULL:
                value = tl.load(value_at)
            else:
                value = tl.load(value_at, mask=(rv < RV)[:, None], other=0.0)
            mixed = tl.dot(value, weight.to(value.dtype), mixed * old[None, :])
            top = higher
            if not PLACED:
                asked_first, asked_second = _turned(asked_first, asked_second, step_cos[:, None], -step_sin[:, None])
        leave_sums(sums, pid + head, rows, mixed[None], rv, rv < RVP, ROWS, RVP, 1)
        leave_weights(largest, weights, pid + head, rows, top[None], whole[None], ROWS, 1)
        low = stop


def decode_rotated(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    rotary: RotaryTable,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `workbench_kernels.decode_lowrank.decode_rotated`."""
    heads = keys.starts.numel()
    rank, value_rank, half = keys.data.shape[1], values.data.shape[1], query.shape[2] // 2
    order = rotary.order
    if order is not None:
        query, key_basis = query[..., order], key_basis[..., order]
    rows, block, blocks = rows_of(query, heads)
    warps, tile, stages, per_processor = config or (CONFIGS[0] if max(rank, value_rank) <= 128 else WIDE)
    programs = programs_for(query.device, heads * -(-keys.longest // tile), per_processor, blocks)
    # Ranks are numbers of a layer: one kernel serves all that fill no tile and whose rows are aligned alike.
    wide, value_wide = max(power(rank), 16), max(power(value_rank), 16)
    unit, value_unit = math.gcd(rank, 8), math.gcd(value_rank, 8)
    slots = Slots.of(programs + heads, 1, rows, value_wide, query.device)
    _attend[(programs, blocks)](
        query.contiguous(), keys.data, values.data, key_basis.to(query.dtype).contiguous(), rotary.low, rotary.high,
        rotary.frequencies, keys.starts, values.starts, keys.lengths, None if positions is None else positions.data,
        None if positions is None else positions.starts, query_positions, *slots, scoring.scale * LOG2E,
        (scoring.softcap or 0.0) * LOG2E, query.shape[1], programs, rank // unit, value_rank // value_unit, K=heads,
        KP=power(heads), ROWS=rows, R=block, RKP=wide, FULL=wide == rank, UNIT=unit, RVP=value_wide,
        VFULL=value_wide == value_rank, VUNIT=value_unit, HALF=half, HALFP=max(power(half), 16), TILE=tile, COARSE=LOW,
        STAGES=stages, MASKED=query_positions is not None,
        PLACED=positions is not None, SOFTCAP=scoring.softcap is not None, EXACT=interpreted(),
        num_warps=warps,
    )  # fmt: skip
    out, sums = join(slots, keys.lengths, query, value_wide, scoring, tile=tile, programs=programs, lse=lse)
    return out[..., :value_rank], sums
