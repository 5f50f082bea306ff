"""The best tokens by the scores of their codes, without a score for each token.

Three short kernels: count how often each block of tokens has each code; find, by a search over the bits of the scores,
the score of the last token that is wanted, which sorts the codes into those above, at and below it; then each block
lists its tokens, once to know how many and once, knowing how many come before, to write them down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power
from workbench_kernels.rows import Ragged

BLOCK = 4096  # tokens of a program


@triton.jit
def _codes_of(codes, starts, lengths, head, block, C: tl.constexpr, BLOCK: tl.constexpr):
    """The codes of a block int32 [BLOCK], its tokens' slots, and which of them there are."""
    slot = block * BLOCK + tl.arange(0, BLOCK)
    real = slot < tl.load(lengths + head)
    base = codes + tl.load(starts + head).to(tl.int64)
    return tl.load(base + slot, mask=real, other=0).to(tl.int32) & (C - 1), slot, real


@triton.jit
def _count(codes, starts, lengths, counts, blocks, C: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens of a block have each code, int32 [C]."""
    head, block = tl.program_id(0), tl.program_id(1)
    code, _, real = _codes_of(codes, starts, lengths, head, block, C, BLOCK)
    found = tl.histogram(code, C, mask=real)
    tl.store(counts + (head * blocks + block).to(tl.int64) * C + tl.arange(0, C), found)


@triton.jit
def _limit(
    table, counts, classes, before, quota, wanted, fewer, blocks, entries,
    ROWS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For one query row: codes above the limit (2), at it (1) and below (0); how many tokens at it are wanted, and how
    many there are before each block.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    if fewer is not None:
        wanted = tl.minimum(tl.load(fewer), wanted)
    code, step = tl.arange(0, C), tl.arange(0, CHUNK)
    line = (head * ROWS + row).to(tl.int64)
    score = tl.load(table + line * entries + code, mask=code < entries, other=float("-inf"))
    # Integers that are ordered as the scores are; minus infinity, and no code at all, become 0.
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    key = tl.where(score > float("-inf"), key, 0)
    each = tl.zeros([C], tl.int32)
    count_base = counts + head.to(tl.int64) * blocks * C
    for first in range(0, blocks, CHUNK):
        block = first + step
        each += tl.sum(
            tl.load(count_base + block[:, None] * C + code[None, :], mask=(block < blocks)[:, None], other=0), 0
        )
    # The largest limit that as many as wanted reach; 0 if there are no more than that.
    limit, bit = tl.full([], 0, tl.uint32), tl.full([], 2147483648, tl.uint32)
    for _ in range(32):
        limit = tl.where(tl.sum(tl.where(key >= (limit | bit), each, 0), 0) >= wanted, limit | bit, limit)
        bit = bit >> 1
    above, equal = key > limit, (key == limit) & (key > 0)
    tl.store(classes + line * C + code, tl.where(above, 2, tl.where(equal, 1, 0)).to(tl.int8))
    tl.store(quota + line, wanted - tl.sum(tl.where(above, each, 0), 0))
    passed = tl.full([], 0, tl.int32)
    for first in range(0, blocks, CHUNK):
        block = first + step
        there = block < blocks
        found = tl.load(count_base + block[:, None] * C + code[None, :], mask=there[:, None], other=0)
        ties = tl.sum(tl.where(equal[None, :], found, 0), 1)  # [CHUNK]
        tl.store(before + line * blocks + block, passed + tl.cumsum(ties, 0) - ties, mask=there)
        passed += tl.sum(ties, 0)


@triton.jit
def _list(
    codes, starts, lengths, classes, before, quota, totals, slots, valid, blocks, room,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """A block's tokens that any query head of one query wants: their number, or, WRITE, themselves, behind those of the
    blocks before; and then also a block's share of what stays empty.
    """
    head, block, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    code, slot, real = _codes_of(codes, starts, lengths, head, block, C, BLOCK)
    taken = tl.zeros([BLOCK], tl.int32)
    for turn in range(ROWS // QUERIES):
        line = (head * ROWS + turn * QUERIES + query).to(tl.int64)
        kind = tl.load(classes + line * C + code, mask=real, other=0).to(tl.int32)
        tie = (kind == 1).to(tl.int32)
        number = tl.load(before + line * blocks + block) + tl.cumsum(tie, 0) - tie
        wanted = (kind == 2) | ((kind == 1) & (number < tl.load(quota + line)))
        taken |= wanted.to(tl.int32)
    line = (head * QUERIES + query).to(tl.int64)
    if WRITE:
        every = tl.arange(0, BLOCKS)
        found = tl.load(totals + line * blocks + every, mask=every < blocks, other=0)
        base = tl.sum(tl.where(every < block, found, 0), 0)
        total = tl.sum(found, 0)
        at = base + tl.cumsum(taken, 0) - taken
        tl.store(slots + line * room + at, slot.to(tl.int64), mask=taken > 0)
        tl.store(valid + line * room + at, taken.to(tl.int8), mask=taken > 0)
        # What is left over, from the total to the room, is shared by the blocks.
        step = tl.arange(0, BLOCK)
        for first in range(total + block * BLOCK, room, blocks * BLOCK):
            empty = first + step
            tl.store(slots + line * room + empty, tl.zeros([BLOCK], tl.int64), mask=empty < room)
            tl.store(valid + line * room + empty, tl.zeros([BLOCK], tl.int8), mask=empty < room)
    else:
        tl.store(totals + line * blocks + block, tl.sum(taken, 0))


def codebook_top(
    table: Tensor,
    codes: Ragged,
    wanted: int,
    queries: int,
    *,
    fewer: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """See `workbench_kernels.codebook.codebook_top`."""
    heads, rows, entries = table.shape
    device, count = table.device, min(wanted, codes.longest)
    room, blocks, c = rows // queries * count, -(-codes.longest // block), max(power(entries), 16)

    def made(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counts, classes = made(heads, blocks, c), made(heads, rows, c, dtype=torch.int8)
    before, quota, totals = made(heads, rows, blocks), made(heads, rows), made(heads, queries, blocks)
    slots, valid = made(heads, queries, room, dtype=torch.int64), made(heads, queries, room, dtype=torch.bool)
    held = (codes.data, codes.starts, codes.lengths)
    _count[(heads, blocks)](*held, counts, blocks, C=c, BLOCK=block, num_warps=8)
    chunk = max(min(power(blocks), 16384 // c), 1)
    _limit[(heads, rows)](
        table.float().contiguous(), counts, classes, before, quota, count, fewer, blocks, entries,
        ROWS=rows, C=c, CHUNK=chunk, num_warps=8,
    )  # fmt: skip
    for write in (False, True):
        _list[(heads, blocks, queries)](
            *held, classes, before, quota, totals, slots, valid.view(torch.int8), blocks, room, ROWS=rows,
            QUERIES=queries, C=c, BLOCK=block, BLOCKS=power(blocks), WRITE=write, num_warps=8,
        )  # fmt: skip
    return slots, valid
