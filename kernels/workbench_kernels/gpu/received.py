"""The softmax weights of rows, added up in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import LOG2E, capped, power
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring

_ROWS = 64  # of a program


@triton.jit
def _add(
    query, keys, lse, into, key_starts, into_starts, lengths, scale, softcap,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """N rows of a head, under all queries of its KV head."""
    head, first = tl.program_id(0), tl.program_id(1) * N
    length = tl.load(lengths + head)
    if first < length:
        row, d = first + tl.arange(0, N), tl.arange(0, DP)
        real = row < length
        key = tl.load(
            keys + (tl.load(key_starts + head) + row).to(tl.int64)[:, None] * D + d[None, :],
            mask=real[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        got = tl.zeros([N], tl.float32)
        for begin in tl.static_range(0, ROWS, R):
            rows = begin + tl.arange(0, R)
            asked = tl.load(
                query + (head * ROWS + rows)[None, :] * D + d[:, None],
                mask=(rows < ROWS)[None, :] & (d < D)[:, None], other=0.0,
            )  # fmt: skip
            score = capped(tl.dot(key, asked) * scale, softcap, SOFTCAP)
            whole = tl.load(lse + head * ROWS + rows, mask=rows < ROWS, other=float("inf")) * 1.4426950408889634
            got += tl.sum(tl.exp2(score - whole[None, :]), 1)
        at = into + (tl.load(into_starts + head) + row).to(tl.int64)
        tl.store(at, tl.load(at, mask=real, other=0.0) + got, mask=real)


def add_received(query: Tensor, keys: Ragged, lse: Tensor, into: Ragged, scoring: Scoring) -> None:
    """See `workbench_kernels.received.add_received`."""
    heads, width = keys.starts.numel(), keys.data.shape[1]
    rows = query.shape[0] // heads * query.shape[1]
    if keys.longest == 0:
        return
    _add[(heads, -(-keys.longest // _ROWS))](
        query.contiguous(), keys.data, lse.contiguous(), into.data, keys.starts, into.starts, keys.lengths,
        scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E, ROWS=rows, R=16, D=width, DP=max(power(width), 16),
        N=_ROWS, SOFTCAP=scoring.softcap is not None, num_warps=4,
    )  # fmt: skip
