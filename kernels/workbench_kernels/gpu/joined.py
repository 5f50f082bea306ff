"""The kernel for what `workbench_kernels.joined` says: a program for each query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import LOG2E, LOWEST, capped, power
from workbench_kernels.rotary import Turn
from workbench_kernels.scoring import Scoring


@triton.jit
def _joined(
    out, lse, query, keys, values, cos, sin, number, result, scale, softcap,
    GROUPS: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    d, dv, row = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SP)
    asked = tl.load(query + head * D + d, mask=d < D, other=0.0).to(tl.float32)
    if R > 0:
        turns = d < R
        partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        other = tl.load(query + head * D + partner, mask=turns, other=0.0).to(tl.float32)
        at = tl.load(number) * R + d
        c, s = tl.load(cos + at, mask=turns, other=1.0), tl.load(sin + at, mask=turns, other=0.0)
        asked = tl.where(turns, asked * c + tl.where(d < R // 2, -other, other) * s, asked)
        asked = asked.to(query.dtype.element_ty).to(tl.float32)
    base = (head // GROUPS) * S + row
    inside = row < S
    key = tl.load(keys + base[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    score = capped(tl.sum(key.to(tl.float32) * asked[None, :], 1) * scale, softcap, SOFTCAP)
    score = tl.where(inside, score, LOWEST)
    before = tl.maximum(tl.load(lse + head) * 1.4426950408889634, LOWEST)
    top = tl.maximum(tl.max(score, 0), before)
    weight, share = tl.where(inside, tl.exp2(score - top), 0.0), tl.exp2(before - top)
    value = tl.load(values + base[:, None] * DV + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0)
    mixed = tl.sum(value.to(tl.float32) * weight[:, None], 0)
    mixed += share * tl.load(out + head * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
    mixed = mixed / (tl.sum(weight, 0) + share)
    tl.store(result + head * DV + dv, mixed.to(result.dtype.element_ty), mask=dv < DV)


def joined(
    out: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, turn: Turn | None = None
) -> Tensor:
    """See `workbench_kernels.joined.joined`."""
    result, width, value_width = torch.empty_like(out), query.shape[2], values.shape[2]
    cos, sin, number = (None, None, None) if turn is None else (x.contiguous() for x in turn)
    rows = keys.shape[1]
    _joined[(len(query),)](
        out.contiguous(), lse.contiguous(), query.contiguous(), keys.contiguous(), values.contiguous(), cos, sin,
        number, result, scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E,
        GROUPS=len(query) // len(keys), S=rows, SP=power(max(rows, 2)), D=width, DP=power(width), DV=value_width,
        DVP=power(value_width), R=0 if turn is None else turn.cos.shape[1], SOFTCAP=scoring.softcap is not None,
        num_warps=4,
    )  # fmt: skip
    return result
