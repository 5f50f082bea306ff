"""The span of all scores of a stretch of packed keys, each channel of which has one scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power, rows_of
from workbench_kernels.rows import PackedRows
from workbench_kernels.scoring import Scoring

_PARTS = 32  # programs that share a head


@triton.jit
def _span(
    query, codes, scale, zero, code_starts, scale_starts, lengths, spans, factor,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BITS: tl.constexpr,
    N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The largest score, and the largest negated one, over a part of a head's keys."""
    head, part = tl.program_id(0), tl.program_id(1)
    rows, b, t = tl.program_id(2) * R + tl.arange(0, R), tl.arange(0, BP), tl.arange(0, N)
    length = tl.load(lengths + head)
    code_at = codes + tl.load(code_starts + head).to(tl.int64) * B
    scale_at = tl.load(scale_starts + head).to(tl.int64) * D
    high = tl.full([R], float("-inf"), tl.float32)
    low = tl.full([R], float("-inf"), tl.float32)
    for tile in tl.range(part, (length + N - 1) // N, PARTS, num_stages=2):
        row = tile * N + t
        real = row < length
        byte = tl.load(
            code_at + row.to(tl.int64)[:, None] * B + b[None, :], mask=real[:, None] & (b < B)[None, :], other=0
        )
        score = tl.zeros([N, R], tl.float32)
        shift = tl.zeros([R], tl.float32)
        for field in tl.static_range(8 // BITS):
            channel = field * B + b
            inside = (channel < D) & (b < B)
            asked = tl.load(
                query + (head * ROWS + rows)[None, :] * D + channel[:, None],
                mask=(rows < ROWS)[None, :] & inside[:, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
            size = tl.load(scale + scale_at + channel, mask=inside, other=0.0).to(tl.float32)
            least = tl.load(zero + scale_at + channel, mask=inside, other=0.0).to(tl.float32)
            code = ((byte >> (field * BITS)) & ((1 << BITS) - 1)).to(tl.float16)
            score = tl.dot(code, (asked * size[:, None]).to(tl.float16), score)
            shift += tl.sum(asked * least[:, None], 0)
        score = (score + shift[None, :]) * factor
        high = tl.maximum(high, tl.max(tl.where(real[:, None], score, float("-inf")), 0))
        low = tl.maximum(low, tl.max(tl.where(real[:, None], -score, float("-inf")), 0))
    place = (head * PARTS + part) * (2 * ROWS) + rows
    tl.store(spans + place, high, mask=rows < ROWS)
    tl.store(spans + place + ROWS, low, mask=rows < ROWS)


@triton.jit
def _lower(
    query, spans, out, raised, drop,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query row of a head."""
    head, row = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, DP)
    at = spans + (head * PARTS + part) * (2 * ROWS) + row
    high, low = tl.max(tl.load(at), 0), -tl.max(tl.load(at + ROWS), 0)
    some = high > float("-inf")
    span = tl.where(some, high - low, 1.0)
    share = tl.where(some, tl.maximum((span - drop) / (span + 1e-8), 0.0), 1.0)
    line = (head * ROWS + row).to(tl.int64)
    asked = tl.load(query + line * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + line * D + d, asked * share, mask=d < D)
    tl.store(raised + line, tl.where(some, low, 0.0) * (1.0 - share))


def lowered_query(query: Tensor, keys: PackedRows, scoring: Scoring, drop: float) -> tuple[Tensor, Tensor]:
    """See `workbench_kernels.lowered.lowered_query`."""
    query = query.contiguous()
    heads, width = keys.codes.starts.numel(), query.shape[2]
    rows, block, blocks = rows_of(query, heads)
    spans = torch.empty(heads, _PARTS, 2, rows, dtype=torch.float32, device=query.device)
    nbytes = keys.codes.data.shape[1]
    assert keys.zero is not None
    _span[(heads, _PARTS, blocks)](
        query, keys.codes.data, keys.scale.data, keys.zero.data, keys.codes.starts, keys.scale.starts,
        keys.codes.lengths, spans, scoring.scale,
        ROWS=rows, R=max(block, 16), D=width, B=nbytes, BP=max(power(nbytes), 16), BITS=keys.bits, N=128, PARTS=_PARTS,
        num_warps=4,
    )  # fmt: skip
    out, raised = torch.empty_like(query), torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    _lower[(heads, rows)](
        query, spans, out, raised, drop, ROWS=rows, D=width, DP=power(width), PARTS=_PARTS, num_warps=1
    )
    return out, raised
