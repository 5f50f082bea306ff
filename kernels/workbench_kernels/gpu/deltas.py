"""Decode attention over blocks of deltas, restored in registers: bits set before it say where a number is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import LOG2E, LOWEST, capped, power, rows_of
from workbench_kernels.rows import DeltaRows, Ragged
from workbench_kernels.scoring import Scoring, with_sinks

_PARTS = 32  # programs that share a head


@triton.jit
def _moved(bits, channel, step, GROUP: tl.constexpr, B: tl.constexpr, D: tl.constexpr):
    """Whether a channel moved at a step, of shapes that broadcast: int32."""
    flat = channel * (GROUP - 1) + step - 1
    real = (step > 0) & (channel < D)
    byte = tl.load(bits + flat % B, mask=real, other=0).to(tl.int32)
    return tl.where(real, (byte >> (flat // B)) & 1, 0)


@triton.jit
def _restored(numbers, bits, block, starts, bit_starts, head,
              GROUP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
              ACROSS: tl.constexpr):  # fmt: skip
    """Block number `block` of a head, [GROUP, DP], or, ACROSS, [DP, GROUP]."""
    line = numbers + (tl.load(starts + head) + block).to(tl.int64) * C
    bit_line = bits + (tl.load(bit_starts + head) + block).to(tl.int64) * B
    d, t = tl.arange(0, DP), tl.arange(0, GROUP)
    if ACROSS:
        moved = _moved(bit_line, d[:, None], t[None, :], GROUP, B, D)
        counts = tl.sum(moved, 1)
        place = (tl.cumsum(counts, 0) - counts + d)[:, None] + tl.cumsum(moved, 1)
        return tl.load(line + tl.minimum(place, C - 1), mask=(d < D)[:, None], other=0.0)
    else:
        moved = _moved(bit_line, d[None, :], t[:, None], GROUP, B, D)
        counts = tl.sum(moved, 0)
        place = (tl.cumsum(counts, 0) - counts + d)[None, :] + tl.cumsum(moved, 0)
        return tl.load(line + tl.minimum(place, C - 1), mask=(d < D)[None, :], other=0.0)


@triton.jit
def _attend(
    query, numbers, bits, starts, bit_starts, lengths, value_numbers, value_bits, value_starts, value_bit_starts,
    outs, sums, scale, softcap,
    ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    C: tl.constexpr, B: tl.constexpr, VC: tl.constexpr, VB: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    WHOLE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Every PARTS-th block of a head, from the part's own on. WHOLE: values are rows."""
    head, part = tl.program_id(0), tl.program_id(1)
    rows = tl.program_id(2) * R + tl.arange(0, R)
    d, dv, t = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, GROUP)
    asked = tl.load(
        query + (head * ROWS + rows)[None, :] * D + d[:, None],
        mask=(rows < ROWS)[None, :] & (d < D)[:, None], other=0.0,
    )  # fmt: skip
    top = tl.full([R], LOWEST, tl.float32)
    whole = tl.zeros([R], tl.float32)
    mixed = tl.zeros([DVP, R], tl.float32)
    for block in tl.range(part, tl.load(lengths + head), PARTS, num_stages=1):
        key = _restored(numbers, bits, block, starts, bit_starts, head, GROUP, B, C, D, DP, False)
        score = capped(tl.dot(key, asked) * scale, softcap, SOFTCAP)  # [GROUP, R]
        higher = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - higher[None, :])
        old = tl.exp2(top - higher)
        whole = whole * old + tl.sum(weight, 0)
        if WHOLE:
            row = (tl.load(value_starts + head) + block * GROUP + t).to(tl.int64)
            value = tl.load(value_numbers + row[None, :] * DV + dv[:, None], mask=(dv < DV)[:, None], other=0.0)
        else:
            value = _restored(
                value_numbers, value_bits, block, value_starts, value_bit_starts, head, GROUP, VB, VC, DV, DVP, True
            )
        mixed = tl.dot(value, weight.to(value.dtype), mixed * old[None, :])
        top = higher
    line = ((head * PARTS + part) * ROWS + rows).to(tl.int64)
    share = mixed / tl.where(whole > 0, whole, 1.0)[None, :]
    tl.store(outs + line[None, :] * DV + dv[:, None], share, mask=(rows < ROWS)[None, :] & (dv < DV)[:, None])
    logarithm = tl.where(whole > 0, top + tl.log2(tl.maximum(whole, 1e-37)), LOWEST)
    tl.store(sums + line, logarithm, mask=rows < ROWS)


@triton.jit
def _join(outs, sums, out, lse, ROWS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PARTS: tl.constexpr):
    """One query row of a head."""
    head, row = tl.program_id(0), tl.program_id(1)
    part, dv = tl.arange(0, PARTS), tl.arange(0, DVP)
    line = ((head * PARTS + part) * ROWS + row).to(tl.int64)
    logarithms = tl.load(sums + line)
    top = tl.max(logarithms, 0)
    shares = tl.where(logarithms > LOWEST, tl.exp2(logarithms - top), 0.0)
    whole = tl.sum(shares, 0)
    found = tl.load(outs + line[:, None] * DV + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
    mixed = tl.sum(found * shares[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    at = (head * ROWS + row).to(tl.int64)
    tl.store(out + at * DV + dv, mixed, mask=dv < DV)
    logarithm = (top + tl.log2(tl.maximum(whole, 1e-37))) * 0.6931471805599453
    tl.store(lse + at, tl.where(whole > 0, logarithm, float("-inf")))


def decode_deltas(
    query: Tensor, keys: DeltaRows, values: DeltaRows | Ragged, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """See `workbench_kernels.deltas.decode_deltas`."""
    heads, width, device = keys.numbers.starts.numel(), keys.channels, query.device
    rows, block, blocks = rows_of(query, heads)
    if isinstance(values, DeltaRows):
        value_width, whole = values.channels, False
        sides = values.numbers.data, values.bits.data, values.numbers.starts, values.bits.starts
    else:
        value_width, whole = values.data.shape[1], True
        sides = values.data, values.data, values.starts, values.starts
    outs = torch.empty(heads, _PARTS, rows, value_width, dtype=torch.float32, device=device)
    sums = torch.empty(heads, _PARTS, rows, dtype=torch.float32, device=device)
    _attend[(heads, _PARTS, blocks)](
        query.contiguous(), keys.numbers.data, keys.bits.data, keys.numbers.starts, keys.bits.starts,
        keys.numbers.lengths, *sides, outs, sums, scoring.scale * LOG2E, (scoring.softcap or 0.0) * LOG2E,
        ROWS=rows, R=max(block, 16), D=width, DP=max(power(width), 16), DV=value_width,
        DVP=max(power(value_width), 16), C=keys.numbers.data.shape[1], B=keys.bits.data.shape[1],
        VC=sides[0].shape[1], VB=sides[1].shape[1], GROUP=keys.group, PARTS=_PARTS, WHOLE=whole,
        SOFTCAP=scoring.softcap is not None, num_warps=8,
    )  # fmt: skip
    out = torch.empty(*query.shape[:2], value_width, dtype=query.dtype, device=device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=device)
    _join[(heads, rows)](
        outs, sums, out, lse, ROWS=rows, DV=value_width, DVP=max(power(value_width), 16), PARTS=_PARTS, num_warps=4
    )
    return with_sinks(out, lse, scoring, query.dtype)
