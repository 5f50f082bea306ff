"""The kernel for what `workbench_kernels.shares` says: keys are read once, for all queries of their head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import LOG2E, capped, power
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring

_TILE = 64  # rows of a program


@triton.jit
def _shares(
    query, keys, starts, lengths, lse, out, longest, scale, softcap,
    ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """N rows of one head."""
    head = tl.program_id(0)
    row, d = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, DP)
    length = tl.load(lengths + head)
    base = keys + tl.load(starts + head).to(tl.int64) * D
    real = row < length
    key = tl.load(base + row[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    key = key.to(tl.float32)
    for one in range(ROWS):
        line = (head * ROWS + one).to(tl.int64)
        asked = tl.load(query + line * D + d, mask=d < D, other=0.0).to(tl.float32)
        score = capped(tl.sum(key * asked[None, :], 1) * scale, softcap, SOFTCAP)
        weight = tl.exp2(score - tl.load(lse + line) * 1.4426950408889634)
        tl.store(out + line * longest + row, tl.where(real, weight, 0.0), mask=row < longest)


def shares(query: Tensor, keys: Ragged, lse: Tensor, scoring: Scoring) -> Tensor:
    """See `workbench_kernels.shares.shares`."""
    heads, width = keys.starts.numel(), keys.data.shape[1]
    rows = query.shape[0] // heads * query.shape[1]
    out = torch.empty(heads, query.shape[0] // heads, query.shape[1], keys.longest, device=query.device)
    if out.numel():
        _shares[(heads, -(-keys.longest // _TILE))](
            query.contiguous(), keys.data, keys.starts, keys.lengths, lse.contiguous(), out, keys.longest,
            scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E,
            ROWS=rows, D=width, DP=power(width), N=_TILE, SOFTCAP=scoring.softcap is not None, num_warps=4,
        )  # fmt: skip
    return out
