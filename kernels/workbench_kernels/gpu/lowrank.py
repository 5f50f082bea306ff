"""Attention and feed-forward modules from low-rank coefficients: what is wide exists in tiles only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.limits import SCRATCH
from workbench_kernels.scoring import Scoring

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where two of them may be subtracted


class AttentionConfig(NamedTuple):
    """Queries and keys of a tile, ranks taken at once, warps, stages of the load pipeline."""

    queries: int
    keys: int
    ranks: int
    warps: int
    stages: int


class MLPConfig(NamedTuple):
    """Tokens and neurons of a tile, columns of the result at once, ranks taken at once, warps, stages."""

    tokens: int
    neurons: int
    columns: int
    ranks: int
    warps: int
    stages: int


# What the bench sweeps; see `attention_config` and `mlp_config` for which is used.
TILED_CONFIGS = (
    AttentionConfig(128, 128, 64, 8, 3),
    AttentionConfig(128, 64, 64, 8, 3),
    AttentionConfig(64, 128, 64, 8, 3),
    AttentionConfig(128, 128, 64, 8, 2),
)
HELD_CONFIGS = (
    AttentionConfig(128, 64, 64, 8, 3),
    AttentionConfig(128, 128, 64, 8, 2),
    AttentionConfig(64, 64, 64, 4, 3),
)
PANEL_CONFIGS = (
    MLPConfig(128, 128, 0, 64, 8, 3),
    MLPConfig(128, 128, 0, 64, 8, 4),
    MLPConfig(128, 64, 0, 64, 4, 4),
)
SUM_CONFIGS = (
    MLPConfig(64, 64, 256, 64, 8, 2),
    MLPConfig(64, 64, 256, 64, 8, 3),
    MLPConfig(128, 64, 256, 64, 8, 2),
)


@triton.jit
def _dot(a, b, into, PRECISION: tl.constexpr):
    """into + a b. "interpreted": Triton's interpreter takes bfloat16 for integers."""
    if PRECISION == "interpreted":
        into = tl.dot(a.to(tl.float32), b.to(tl.float32), into)
    else:
        into = tl.dot(a, b, into, input_precision=PRECISION)
    return into


@triton.jit
def _coefficients(x, row, stride, rank, count, RANK: tl.constexpr):
    """A tile [rows, ranks] of coefficients; nothing beyond either end."""
    at = x + row.to(tl.int64)[:, None] * stride + rank[None, :]
    return tl.load(at, mask=(row < count)[:, None] & (rank < RANK)[None, :], other=0.0)


@triton.jit
def _basis(x, rank, rank_stride, column, column_stride, columns, RANK: tl.constexpr):
    """A tile [ranks, columns] of a basis; nothing beyond either end."""
    at = x + rank[:, None] * rank_stride + column[None, :] * column_stride
    return tl.load(at, mask=(rank < RANK)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _expand(
    x, row, stride, count, basis, rank_stride, column, column_stride, columns, bias,
    RANK: tl.constexpr, R: tl.constexpr, T: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of coefficients times some columns of their basis, and the bias: float32 [T, W]."""
    wide = tl.zeros([T, W], tl.float32)
    for first in tl.range(0, RANK, R, num_stages=STAGES):
        rank = first + tl.arange(0, R)
        thin = _coefficients(x, row, stride, rank, count, RANK)
        some = _basis(basis, rank, rank_stride, column, column_stride, columns, RANK).to(thin.dtype)
        wide = _dot(thin, some, wide, PRECISION)
    if BIAS:
        wide += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return wide


@triton.jit
def _rotate(
    x, row, stride, count, basis, rank_stride, column_stride, bias, cos, sin, cos_stride, sin_stride,
    RANK: tl.constexpr, R: tl.constexpr, T: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, BIAS: tl.constexpr,
    ROTARY: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of coefficients expanded and rotated: the two halves of a head's width, [T, HP] each, in their dtype."""
    HALF: tl.constexpr = D // 2
    column = tl.arange(0, HP)
    low = tl.zeros([T, HP], tl.float32)
    high = tl.zeros([T, HP], tl.float32)
    for first in tl.range(0, RANK, R, num_stages=STAGES):
        rank = first + tl.arange(0, R)
        thin = _coefficients(x, row, stride, rank, count, RANK)
        left = _basis(basis, rank, rank_stride, column, column_stride, HALF, RANK).to(thin.dtype)
        right = _basis(basis + HALF * column_stride, rank, rank_stride, column, column_stride, HALF, RANK)
        low = _dot(thin, left, low, PRECISION)
        high = _dot(thin, right.to(thin.dtype), high, PRECISION)
    if BIAS:
        low += tl.load(bias + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        high += tl.load(bias + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if ROTARY:
        inside = (row < count)[:, None] & (column < HALF)[None, :]
        cos_at = cos + row.to(tl.int64)[:, None] * cos_stride + column[None, :]
        sin_at = sin + row.to(tl.int64)[:, None] * sin_stride + column[None, :]
        first_cos = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)
        first_sin = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)
        second_cos = tl.load(cos_at + HALF, mask=inside, other=0.0).to(tl.float32)
        second_sin = tl.load(sin_at + HALF, mask=inside, other=0.0).to(tl.float32)
        turned = low * first_cos - high * first_sin
        high = high * second_cos + low * second_sin
        low = turned
    return low.to(x.dtype.element_ty), high.to(x.dtype.element_ty)


@triton.jit
def _hold(
    keys, values, key_basis, value_basis, key_bias, value_bias, cos, sin, held_keys, held_values, count, first_head,
    keys_n, values_n, uk_h, uk_r, uk_d, uv_h, uv_r, uv_d, cos_n, sin_n,
    RK: tl.constexpr, RV: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, KEY_BIAS: tl.constexpr, VALUE_BIAS: tl.constexpr, ROTARY: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one KV head's keys, rotated, and values, into rows [k, n, d]."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    slot = tl.program_id(1)
    head = (first_head + slot).to(tl.int64)
    half, width = tl.arange(0, HP), tl.arange(0, DP)
    to = (slot.to(tl.int64) * count + row) * D
    low, high = _rotate(
        keys, row, keys_n, count, key_basis + head * uk_h, uk_r, uk_d, key_bias + head * D if KEY_BIAS else key_bias,
        cos, sin, cos_n, sin_n, RK, R, N, D, HP, KEY_BIAS, ROTARY, STAGES, PRECISION,
    )  # fmt: skip
    inside = (row < count)[:, None] & (half < D // 2)[None, :]
    tl.store(held_keys + to[:, None] + half[None, :], low, mask=inside)
    tl.store(held_keys + to[:, None] + D // 2 + half[None, :], high, mask=inside)
    value = _expand(
        values, row, values_n, count, value_basis + head * uv_h, uv_r, width, uv_d, D,
        value_bias + head * D if VALUE_BIAS else value_bias, RV, R, N, DP, VALUE_BIAS, STAGES, PRECISION,
    )  # fmt: skip
    to = to[:, None] + width[None, :]
    tl.store(held_values + to, value.to(values.dtype.element_ty), mask=(row < count)[:, None] & (width < D)[None, :])


@triton.jit
def _attend(
    queries, keys, values, query_basis, key_basis, value_basis, query_bias, key_bias, value_bias, cos, sin, out,
    count, first_head, queries_n, keys_n, values_n, uq_h, uq_r, uq_d, uk_h, uk_r, uk_d, uv_h, uv_r, uv_d,
    cos_n, sin_n, out_n, scale, softcap, window,
    GROUPS: tl.constexpr, RQ: tl.constexpr, RK: tl.constexpr, RV: tl.constexpr,
    D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    QUERY_BIAS: tl.constexpr, KEY_BIAS: tl.constexpr, VALUE_BIAS: tl.constexpr, ROTARY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HELD: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M queries of one head over all keys they see. HELD: keys and values are rows [k, n, d] of the heads from
    `first_head` on; else coefficients, expanded for N keys at a time. Scores are in units of log2.
    """
    # Long rows of tiles start first, so that they do not end last.
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    slot = tl.program_id(0) // GROUPS
    head = (first_head * GROUPS + tl.program_id(0)).to(tl.int64)
    kv_head = (first_head + slot).to(tl.int64)
    row = begin + tl.arange(0, M)
    half, width = tl.arange(0, HP), tl.arange(0, DP)
    query_low, query_high = _rotate(
        queries, row, queries_n, count, query_basis + head * uq_h, uq_r, uq_d,
        query_bias + head * D if QUERY_BIAS else query_bias,
        cos, sin, cos_n, sin_n, RQ, R, M, D, HP, QUERY_BIAS, ROTARY, STAGES, PRECISION,
    )  # fmt: skip
    top = tl.full([M], LOWEST, tl.float32)
    whole = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, DP], tl.float32)
    start = 0
    if WINDOW:
        start = tl.maximum(begin - window + 1, 0) // N * N
    stop = count
    if CAUSAL:
        stop = tl.minimum(begin + M, count)
    for first in tl.range(start, stop, N, num_stages=STAGES if HELD else 1):
        place = first + tl.arange(0, N)
        if HELD:
            at = (slot.to(tl.int64) * count + place) * D
            inside = (place < count)[:, None] & (half < D // 2)[None, :]
            low = tl.load(keys + at[:, None] + half[None, :], mask=inside, other=0.0)
            high = tl.load(keys + at[:, None] + D // 2 + half[None, :], mask=inside, other=0.0)
        else:
            low, high = _rotate(
                keys, place, keys_n, count, key_basis + kv_head * uk_h, uk_r, uk_d,
                key_bias + kv_head * D if KEY_BIAS else key_bias,
                cos, sin, cos_n, sin_n, RK, R, N, D, HP, KEY_BIAS, ROTARY, STAGES, PRECISION,
            )  # fmt: skip
        score = _dot(query_low, tl.trans(low), tl.zeros([M, N], tl.float32), PRECISION)
        score = _dot(query_high, tl.trans(high), score, PRECISION) * scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which stays finite at both ends
            score = softcap * (1.0 - 2.0 / (tl.exp2(score * (2.8853900817779268 / softcap)) + 1.0))
        seen = (place < count)[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] <= row[:, None])
        if WINDOW:
            seen = seen & (place[None, :] > row[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        old = tl.exp2(top - higher)
        whole = whole * old + tl.sum(weight, 1)
        top = higher
        if HELD:
            inside = (place < count)[:, None] & (width < D)[None, :]
            value = tl.load(values + at[:, None] + width[None, :], mask=inside, other=0.0)
        else:
            value = _expand(
                values, place, values_n, count, value_basis + kv_head * uv_h, uv_r, width, uv_d, D,
                value_bias + kv_head * D if VALUE_BIAS else value_bias, RV, R, N, DP, VALUE_BIAS, STAGES, PRECISION,
            ).to(values.dtype.element_ty)  # fmt: skip
        mixed = _dot(weight.to(value.dtype), value, mixed * old[:, None], PRECISION)
    to = out + row.to(tl.int64)[:, None] * out_n + head * D + width[None, :]
    # Rows beyond the end may have seen nothing.
    result = (mixed / tl.maximum(whole, 1e-30)[:, None]).to(out.dtype.element_ty)
    tl.store(to, result, mask=(row < count)[:, None] & (width < D)[None, :])


@triton.jit
def _neurons(
    gate, up, gate_basis, up_basis, gate_bias, up_bias, row, count, column, columns,
    gate_n, up_n, gate_r, gate_f, up_r, up_f,
    R1: tl.constexpr, R2: tl.constexpr, M: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neurons [M, F], float32: the activation of one expansion, times the other."""
    x = _expand(
        gate, row, gate_n, count, gate_basis, gate_r, column, gate_f, columns, gate_bias,
        R1, R, M, F, GATE_BIAS, STAGES, PRECISION,
    )  # fmt: skip
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(y)) is the sigmoid of 2 y.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = tl.maximum(x, 0.0)
    if GATED:
        x *= _expand(
            up, row, up_n, count, up_basis, up_r, column, up_f, columns, up_bias,
            R2, R, M, F, UP_BIAS, STAGES, PRECISION,
        )  # fmt: skip
    return x


@triton.jit
def _sum_neurons(
    gate, up, gate_basis, up_basis, gate_bias, up_bias, down, sums, count, columns, share,
    gate_n, up_n, gate_r, gate_f, up_r, up_f, down_f, down_r,
    R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    M: tl.constexpr, F: tl.constexpr, C: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a share of the neurons of M tokens adds to C columns of the result: sums float32 [shares, n, r3]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    into = tl.program_id(1) * C + tl.arange(0, C)
    begin = tl.program_id(2) * share
    mixed = tl.zeros([M, C], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + share, columns), F, num_stages=1):
        column = first + tl.arange(0, F)
        x = _neurons(
            gate, up, gate_basis, up_basis, gate_bias, up_bias, row, count, column, columns,
            gate_n, up_n, gate_r, gate_f, up_r, up_f,
            R1, R2, M, F, R, ACT, GATED, GATE_BIAS, UP_BIAS, STAGES, PRECISION,
        ).to(gate.dtype.element_ty)  # fmt: skip
        at = down + column.to(tl.int64)[:, None] * down_f + into[None, :] * down_r
        some = tl.load(at, mask=(column < columns)[:, None] & (into < R3)[None, :], other=0.0)
        mixed = _dot(x, some.to(x.dtype), mixed, PRECISION)
    to = (tl.program_id(2).to(tl.int64) * count + row)[:, None] * R3 + into[None, :]
    tl.store(sums + to, mixed.to(sums.dtype.element_ty), mask=(row < count)[:, None] & (into < R3)[None, :])


@triton.jit
def _hold_neurons(
    gate, up, gate_basis, up_basis, gate_bias, up_bias, panel, count, columns,
    gate_n, up_n, gate_r, gate_f, up_r, up_f,
    R1: tl.constexpr, R2: tl.constexpr, M: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of neurons into a panel [n, f]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * F + tl.arange(0, F)
    x = _neurons(
        gate, up, gate_basis, up_basis, gate_bias, up_bias, row, count, column, columns,
        gate_n, up_n, gate_r, gate_f, up_r, up_f,
        R1, R2, M, F, R, ACT, GATED, GATE_BIAS, UP_BIAS, STAGES, PRECISION,
    )  # fmt: skip
    to = panel + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, x.to(panel.dtype.element_ty), mask=(row < count)[:, None] & (column < columns)[None, :])


def attention_config(width: int, dtype: torch.dtype, held: bool) -> AttentionConfig:
    """Tiles that fit into a Hopper processor's registers and shared memory."""
    if dtype == torch.float32:
        return AttentionConfig(64, 32, 32, 8, 2)
    if width > 128:
        return AttentionConfig(64, 64, 32, 8, 2)
    return AttentionConfig(128, 64, 64, 8, 3) if held else AttentionConfig(128, 128, 64, 8, 3)


def mlp_config(dtype: torch.dtype, columns: int, held: bool) -> MLPConfig:
    """Tiles that fit into a Hopper processor's registers and shared memory. columns: r3."""
    if dtype == torch.float32:
        return MLPConfig(64, 64, 64, 32, 8, 2)
    if held:
        return MLPConfig(128, 128, 0, 64, 8, 3)
    return MLPConfig(64, 64, min(max(_power(columns), 16), 256), 64, 8, 2)


def attend_factors(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_basis: Tensor,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    causal: bool = True,
    scratch: int = SCRATCH,
    tile: int = 128,
    config: AttentionConfig | None = None,
) -> Tensor:
    """See `workbench_kernels.lowrank.attend_factors`."""
    del tile  # the reference's
    count, (heads, _, width), kv_heads = len(queries), query_basis.shape, len(key_basis)
    out = queries.new_empty(count, heads * width)
    if not count:
        return out
    queries, keys, values = _rows(queries), _rows(keys), _rows(values)
    cos, sin = (None if x is None else _rows(x) for x in (cos, sin))
    query_bias, key_bias, value_bias = (
        None if x is None else x.contiguous() for x in (query_bias, key_bias, value_bias)
    )
    at_once = min(kv_heads, scratch // (2 * count * width * queries.element_size()))
    tile = config or attention_config(width, queries.dtype, at_once > 0)
    sizes = {
        "RK": keys.shape[1], "RV": values.shape[1], "D": width, "HP": max(_power(width // 2), 16),
        "DP": max(_power(width), 16), "N": tile.keys, "R": tile.ranks, "KEY_BIAS": key_bias is not None,
        "VALUE_BIAS": value_bias is not None, "ROTARY": cos is not None, "STAGES": tile.stages,
        "PRECISION": _precision(queries), "num_warps": tile.warps,
    }  # fmt: skip
    turns = (0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0))
    blocks = triton.cdiv(count, tile.queries)
    held = queries.new_empty(2, at_once, count, width)
    step = at_once or kv_heads
    for first in range(0, kv_heads, step):
        some = min(step, kv_heads - first)
        if at_once:
            _hold[(triton.cdiv(count, tile.keys), some)](
                keys, values, key_basis, value_basis, key_bias, value_bias, cos, sin, held[0], held[1], count, first,
                keys.stride(0), values.stride(0), *key_basis.stride(), *value_basis.stride(), *turns, **sizes,
            )  # fmt: skip
        _attend[(some * (heads // kv_heads), blocks)](
            queries, held[0] if at_once else keys, held[1] if at_once else values, query_basis, key_basis, value_basis,
            query_bias, key_bias, value_bias, cos, sin, out, count, first, queries.stride(0), keys.stride(0),
            values.stride(0), *query_basis.stride(), *key_basis.stride(), *value_basis.stride(), *turns, out.stride(0),
            scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E, scoring.window or 0, GROUPS=heads // kv_heads,
            RQ=queries.shape[1], M=tile.queries, QUERY_BIAS=query_bias is not None, CAUSAL=causal,
            WINDOW=scoring.window is not None, SOFTCAP=scoring.softcap is not None, HELD=at_once > 0, **sizes,
        )  # fmt: skip
    return out


def mlp_factors(
    gate: Tensor,
    up: Tensor | None,
    gate_basis: Tensor,
    up_basis: Tensor | None,
    down: Tensor,
    *,
    act: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scratch: int = SCRATCH,
    tile: int = 128,
    config: MLPConfig | None = None,
) -> Tensor:
    """See `workbench_kernels.lowrank.mlp_factors`."""
    del tile  # the reference's
    count, (neurons, columns) = len(gate), down.shape
    if not count:
        return gate.new_empty(0, columns)
    fitting = scratch // (neurons * gate.element_size())
    held = columns > 256 and fitting > 0
    tile = config or mlp_config(gate.dtype, columns, held)
    gate = _rows(gate)
    up = None if up is None else _rows(up)
    gate_bias, up_bias = (None if x is None else x.contiguous() for x in (gate_bias, up_bias))
    strides = (gate.stride(0), 0 if up is None else up.stride(0), *gate_basis.stride())
    strides += (0, 0) if up_basis is None else up_basis.stride()
    sizes = {
        "R1": gate.shape[1], "R2": 0 if up is None else up.shape[1], "M": tile.tokens, "F": tile.neurons,
        "R": tile.ranks, "ACT": act, "GATED": up is not None, "GATE_BIAS": gate_bias is not None,
        "UP_BIAS": up_bias is not None, "STAGES": tile.stages, "PRECISION": _precision(gate), "num_warps": tile.warps,
    }  # fmt: skip
    if held:
        # Whole tiles of tokens, but at least as many as fit where a tile does not.
        rows = min(count, fitting // tile.tokens * tile.tokens or fitting)
        out, panel = gate.new_empty(count, columns), gate.new_empty(rows, neurons)
        weight = down.to(gate.dtype)
        for first in range(0, count, rows):
            some = min(rows, count - first)
            _hold_neurons[(triton.cdiv(some, tile.tokens), triton.cdiv(neurons, tile.neurons))](
                gate[first:], None if up is None else up[first:], gate_basis, up_basis, gate_bias, up_bias, panel,
                some, neurons, *strides, **sizes,
            )  # fmt: skip
            torch.matmul(panel[:some], weight, out=out[first : first + some])
        return out
    rows, blocks = triton.cdiv(count, tile.tokens), triton.cdiv(columns, tile.columns)
    tiles = triton.cdiv(neurons, tile.neurons)
    shares = min(tiles, max(1, _processors(gate) // (rows * blocks)))
    share = triton.cdiv(tiles, shares) * tile.neurons
    shares = triton.cdiv(neurons, share)
    sums = gate.new_empty(shares, count, columns, dtype=gate.dtype if shares == 1 else torch.float32)
    _sum_neurons[(rows, blocks, shares)](
        gate, up, gate_basis, up_basis, gate_bias, up_bias, down, sums, count, neurons, share, *strides,
        *down.stride(), R3=columns, C=tile.columns, **sizes,
    )  # fmt: skip
    return sums[0] if shares == 1 else sums.sum(0).to(gate.dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(x: int) -> int:
    return int(triton.next_power_of_2(x))


def _precision(x: Tensor) -> str:
    """Float32 products at nearly float32's precision; 16-bit ones are exact anyway."""
    if not x.is_cuda:
        return "interpreted"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _processors(x: Tensor) -> int:
    """How many programs fill the GPU; under the interpreter enough for several shares."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
