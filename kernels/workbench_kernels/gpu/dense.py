"""Decode attention over plain rows, dense or with lengths of their own per head."""

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
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring


class Config(NamedTuple):
    """How a program works: warps, tokens a warp takes at once, stages of the load pipeline, programs a processor."""

    warps: int
    tokens: int
    stages: int
    per_processor: int


@triton.jit(do_not_specialize=["window", "queries", "programs"])
def _attend(
    query, keys, values, key_starts, value_starts, lengths, positions, position_starts, asked_at,
    key_sizes, key_size_starts, value_sizes, value_size_starts,
    sums, largest, weights, scale, softcap, window, queries, programs,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr, PLACED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SIZED: tl.constexpr,
):  # fmt: skip
    """A run of tiles of G * N rows. Each warp takes N rows of a tile and keeps a softmax of its own (the dimension G),
    so that warps never wait for one another; tokens lie along the matrix units' long side, the few queries along the
    short one.
    """
    TILE: tl.constexpr = G * N
    pid = tl.program_id(0)
    rows = tl.program_id(1) * R + tl.arange(0, R)
    g, t, d, dv = tl.arange(0, G), tl.arange(0, N), tl.arange(0, DP), tl.arange(0, DVP)
    within = g[:, None] * N + t[None, :]  # [G, N]
    spans = spans_of(lengths, None, K, KP, TILE, 0)
    tiles, ends = tiles_of(spans, TILE)
    total = tl.sum(tiles, 0)
    low, high = run_of(total, pid, programs)
    if MASKED:
        where = tl.load(asked_at + rows % queries, mask=rows < ROWS, other=0)
    while low < high:
        head = tl.sum((ends <= low).to(tl.int32), 0)
        begin = at(ends - tiles, head, KP)
        stop = tl.minimum(high, at(ends, head, KP))
        length = at(spans, head, KP)
        key_base = keys + tl.load(key_starts + head).to(tl.int64) * D
        value_base = values + tl.load(value_starts + head).to(tl.int64) * DV
        asked = tl.load(
            query + ((head * ROWS + rows)[None, :] * D + d[:, None]),
            mask=(rows < ROWS)[None, :] & (d < D)[:, None], other=0.0,
        )  # fmt: skip
        asked = tl.broadcast_to(asked[None], [G, DP, R])
        top = tl.full([G, R], LOWEST, tl.float32)
        whole = tl.zeros([G, R], tl.float32)
        mixed = tl.zeros([G, DVP, R], tl.float32)
        for tile in tl.range(low - begin, stop - begin, num_stages=STAGES):
            first = tile * TILE
            # Rows beyond the end read the last row, and are hidden.
            row = tl.minimum(within, length - 1 - first)
            key_at = key_base + first.to(tl.int64) * D + (row[:, :, None] * D + d[None, None, :])
            value_at = value_base + first.to(tl.int64) * DV + (row[:, None, :] * DV + dv[None, :, None])
            if D == DP:
                key = tl.load(key_at)
            else:
                key = tl.load(key_at, mask=(d < D)[None, None, :], other=0.0)
            score = tl.dot(key, asked) * scale
            seen = (within < length - first)[:, :, None]
            if SIZED:
                size = tl.load(key_sizes + tl.load(key_size_starts + head) + first + row).to(tl.float32)
                score *= size[:, :, None]
                seen = seen & (size < float("inf"))[:, :, None]
            score = capped(score, softcap, SOFTCAP)
            if MASKED:
                if PLACED:
                    place = tl.load(positions + tl.load(position_starts + head).to(tl.int64) + first + row)
                else:
                    place = first + within
                seen = seen & (place[:, :, None] <= where[None, None, :])
                if WINDOW:
                    seen = seen & (place[:, :, None] > where[None, None, :] - window)
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None, :])
            old = tl.exp2(top - higher)
            whole = whole * old + tl.sum(weight, 1)
            if DV == DVP:
                value = tl.load(value_at)
            else:
                value = tl.load(value_at, mask=(dv < DV)[None, :, None], other=0.0)
            if SIZED:
                size = tl.load(value_sizes + tl.load(value_size_starts + head) + first + row).to(tl.float32)
                weight *= size[:, :, None]
            mixed = tl.dot(value, weight.to(value.dtype), mixed * old[:, None, :])
            top = higher
        leave_sums(sums, pid + head, rows, mixed, dv, dv < DV, ROWS, DV, G)
        leave_weights(largest, weights, pid + head, rows, top, whole, ROWS, G)
        low = stop


def config_for(width: int, longest: int) -> Config:
    """What was fastest where it was measured (kernels/bench/decode.py)."""
    if width > 128:
        return Config(4, 16, 2, 1)
    return Config(4, 32, 3, 2) if longest > 4096 else Config(4, 16, 3, 2)


def decode_dense(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    sizes: tuple[Ragged, Ragged] | None = None,
    lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `workbench_kernels.decode.decode_dense`."""
    heads = keys.starts.numel()
    width, value_width = keys.data.shape[1], values.data.shape[1]
    rows, block, blocks = rows_of(query, heads)
    warps, tokens, stages, per_processor = config or config_for(max(width, value_width), keys.longest)
    tile = warps * tokens
    programs = programs_for(query.device, heads * -(-keys.longest // tile), per_processor, blocks)
    slots = Slots.of(programs + heads, warps, rows, value_width, query.device)
    _attend[(programs, blocks)](
        query.contiguous(), keys.data, values.data, keys.starts, values.starts, keys.lengths,
        None if positions is None else positions.data, None if positions is None else positions.starts, query_positions,
        *((None,) * 4 if sizes is None else (x for side in sizes for x in (side.data, side.starts))),
        *slots, scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E, scoring.window or 0, query.shape[1],
        programs,
        K=heads, KP=power(heads), ROWS=rows, R=block, D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), G=warps, N=tokens, STAGES=stages, MASKED=query_positions is not None,
        PLACED=positions is not None, WINDOW=scoring.window is not None, SOFTCAP=scoring.softcap is not None,
        SIZED=sizes is not None, num_warps=warps,
    )  # fmt: skip
    return join(slots, keys.lengths, query, value_width, scoring, tile=tile, programs=programs, lse=lse)
