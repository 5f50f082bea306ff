"""How decode attention is shared out over a GPU, and how its parts are joined.

A decode step has too few heads to fill a GPU, and heads may be unequally long. So the tiles of all heads are laid end
to end and cut into runs of equal length, one a program (stream-K; "Lean Attention", Sanovar et al. 2024,
arXiv:2405.10480): a run may end within a head and begin in the next. Each program leaves the softmax over its part of
a head, warp by warp and not yet divided, in a slot of its own; `join` adds a head's slots up. As runs follow the
heads, program + head is a different slot for each part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.scoring import Scoring, with_sinks

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LOWEST = tl.constexpr(-1e30)  # stands for minus infinity where two of them may be subtracted


class Slots(NamedTuple):
    """Room for the parts of an attention, one of each warp of a program: sums float32 [s, g, r, d], largest score and
    sum of weights float32 [s, g, r].
    """

    sums: Tensor
    largest: Tensor
    weights: Tensor

    @classmethod
    def of(cls, count: int, warps: int, rows: int, width: int, device: torch.device) -> Slots:
        sums = torch.empty(count, warps, rows, width, dtype=torch.float32, device=device)
        both = torch.empty(2, count, warps, rows, dtype=torch.float32, device=device)
        return cls(sums, both[0], both[1])


def programs_for(device: torch.device, tiles: int, per_processor: int, blocks: int = 1, others: int = 0) -> int:
    """How many programs share `tiles` tiles, when so many run on a multiprocessor at once, for each block of rows.

    others: short programs that run beside them, for which room is left if they are few.
    """
    if device.type != "cuda":
        return 5  # under the interpreter: few, so that runs end within heads, and at times more than there are tiles
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    room = -(-processors * per_processor // blocks)
    return max(min(room - others if 8 * others <= room else room, tiles), 1)


def rows_of(query: Tensor, heads: int) -> tuple[int, int, int]:
    """Query rows that share a KV head, rows of a block (8 or 16), and blocks, of query [h, q, d] over `heads`."""
    rows = query.shape[0] // heads * query.shape[1]
    block = 8 if rows <= 8 else 16
    return rows, block, -(-rows // block)


@triton.jit
def spans_of(lengths, others, K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """What is cut into tiles, int32 [KP]: the `lengths` of K heads; where there are `others`, with STEP 0 the sum of
    both, otherwise what both reach, in whole steps, and nothing of a head in which that is less than a tile.
    """
    heads = tl.arange(0, KP)
    spans = tl.load(lengths + heads, mask=heads < K, other=0)
    if others is not None:
        more = tl.load(others + heads, mask=heads < K, other=0)
        if STEP == 0:
            spans += more
        else:
            spans = tl.minimum(spans, more) // STEP * STEP
            spans = tl.where(spans < TILE, 0, spans)
    return spans


@triton.jit
def tiles_of(spans, TILE: tl.constexpr):
    """The tiles of each head, given what is cut into them, and where they end when all lie end to end."""
    tiles = (spans + TILE - 1) // TILE
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def at(values, index, KP: tl.constexpr):
    """values [KP] at a scalar index."""
    return tl.sum(tl.where(tl.arange(0, KP) == index, values, 0), 0)


@triton.jit
def run_of(total, program, programs):
    """The first tile of a program's run, and that of the next. Programs that are more than the tiles get none."""
    working = tl.maximum(tl.minimum(programs, total), 1).to(tl.int64)
    low, high = total * tl.minimum(program, working) // working, total * tl.minimum(program + 1, working) // working
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def owner_of(total, tile, programs):
    """The program whose run holds this tile."""
    working = tl.maximum(tl.minimum(programs, total), 1).to(tl.int64)
    return (((tile + 1) * working - 1) // tl.maximum(total, 1)).to(tl.int32)


@triton.jit
def capped(scores, softcap, SOFTCAP: tl.constexpr):
    """Scores, in units of log2, bent by softcap * tanh(score / softcap) if there is one (in the same units)."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which stays finite at both ends
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / softcap)) + 1.0))
    return scores


@triton.jit
def leave_sums(sums, slot, rows, out, channel, real, ROWS: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """Write each warp's sums out [G, C, R], of channels `channel` [C] where `real` [C] and of query rows `rows` [R]."""
    place = (slot.to(tl.int64) * G + tl.arange(0, G))[:, None] * ROWS + rows[None, :]  # [G, R]
    tl.store(
        sums + place[:, None, :] * D + channel[None, :, None], out,
        mask=(rows < ROWS)[None, None, :] & real[None, :, None],
    )  # fmt: skip


@triton.jit
def leave_weights(largest, weights, slot, rows, top, whole, ROWS: tl.constexpr, G: tl.constexpr):
    """Write each warp's largest score and sum of weights [G, R] of query rows `rows` [R]."""
    place = (slot.to(tl.int64) * G + tl.arange(0, G))[:, None] * ROWS + rows[None, :]
    tl.store(largest + place, top, mask=(rows < ROWS)[None, :])
    tl.store(weights + place, whole, mask=(rows < ROWS)[None, :])


@triton.jit(do_not_specialize=["rest_slots", "programs"])
def _join(
    sums, largest, weights, lengths, others, rest_slots, out, lse, programs,
    K: tl.constexpr, KP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, STEP: tl.constexpr, RESTS: tl.constexpr, LSE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """C channels of one query row of one KV head: its slots, rescaled to the largest score, added up and divided."""
    head, row = tl.program_id(0), tl.program_id(1)
    d = tl.program_id(2) * C + tl.arange(0, C)
    tiles, ends = tiles_of(spans_of(lengths, others, K, KP, TILE, STEP), TILE)
    total = tl.sum(tiles, 0)
    end = at(ends, head, KP)
    count = at(tiles, head, KP)
    first = owner_of(total, end - count, programs)
    parts = tl.where(count > 0, owner_of(total, end - 1, programs) - first + 1, 0) * G
    top = tl.full([], LOWEST, tl.float32)
    whole = tl.zeros([], tl.float32)
    mixed = tl.zeros([C], tl.float32)
    step = tl.arange(0, CHUNK)
    for begin in range(0, parts + RESTS * G, CHUNK):
        part = begin + step
        there = part < parts + RESTS * G
        # The parts of a head's rest come behind those of the programs.
        slot = tl.where(part < parts, (first + head) * G + part, (rest_slots + head * RESTS) * G + part - parts)
        place = slot.to(tl.int64) * ROWS + row
        tops = tl.load(largest + place, mask=there, other=LOWEST)
        shares = tl.load(weights + place, mask=there, other=0.0)
        found = tl.load(sums + place[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        old, new = tl.exp2(top - higher), tl.where(there, tl.exp2(tops - higher), 0.0)
        whole = whole * old + tl.sum(shares * new, 0)
        mixed = mixed * old + tl.sum(found * new[:, None], 0)
        top = higher
    # Row j * q + i of KV head `head` is query i of its query head j, so rows lie as query heads do.
    line = (head * ROWS + row).to(tl.int64)
    tl.store(out + line * D + d, mixed / tl.where(whole > 0, whole, 1.0), mask=d < D)
    if LSE:
        if tl.program_id(2) == 0:
            logarithm = (top + tl.log2(tl.maximum(whole, 1e-37))) * 0.6931471805599453
            tl.store(lse + line, tl.where(whole > 0, logarithm, float("-inf")))


def join(
    slots: Slots,
    lengths: Tensor,
    query: Tensor,
    width: int,
    scoring: Scoring,
    *,
    tile: int,
    programs: int,
    lse: bool,
    others: Tensor | None = None,
    step: int = 0,
    rests: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Add up what the programs left: output [h, q, width] in the query's dtype, and its log-sum-exp [h, q] if asked.

    lengths, others, step: see `spans_of`. rests: how many further slots for each head follow those of the programs. A
    head of which nothing was seen gives zeros, and minus infinity. Sinks of the scoring join it here.
    """
    heads, rows, channels = lengths.numel(), slots.sums.shape[2], min(power(width), 64)
    out = torch.empty(*query.shape[:2], width, dtype=query.dtype, device=query.device)
    sunk = scoring.sinks is not None
    found = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) if lse or sunk else None
    _join[(heads, rows, -(-width // channels))](
        slots.sums, slots.largest, slots.weights, lengths, others, programs + heads, out, found, programs,
        K=heads, KP=power(heads), TILE=tile, ROWS=rows, D=width, C=channels, G=slots.sums.shape[1], STEP=step,
        RESTS=rests, LSE=lse or sunk, CHUNK=128, num_warps=4,
    )  # fmt: skip
    if found is not None:
        out, found = with_sinks(out, found, scoring, query.dtype)
    return out, found if lse else None


def power(count: int) -> int:
    """The least power of two that is not smaller."""
    return int(triton.next_power_of_2(count))


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    knobs: Any = triton.knobs
    return bool(knobs.runtime.interpret)
