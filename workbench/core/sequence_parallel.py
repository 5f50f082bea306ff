"""Attention whose keys and values lie on several devices, each with a part of the text: exact, in two ways.

In a tree, devices exchange what their softmax came to; in a ring, keys and values go round. Both work on whatever group
`torch.distributed` has (gloo on CPUs, NCCL on GPUs), and both are the softmax over all keys.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from workbench.core.partial_softmax import PartialSoftmax
from workbench_kernels import Scoring

Group = dist.ProcessGroup | None


def tree_attention(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scoring: Scoring,
    group: Group = None,
) -> Tensor:
    """Attention of queries [h, q, d], the same on every device, over the keys of all: [h, q, dv] float32.

    keys [k, m, d], values [k, m, dv] and their positions [m] are this device's; m may differ, and be 0. Largest scores,
    sums of weights and weighted values are reduced over the group: h q (dv + 2) numbers, however long the text is
    (Tree Attention: Shyam et al. 2024, arXiv:2408.04093).
    """
    state = _state(queries, query_positions, keys, values, positions, scoring)
    maximum = state.maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    fade = (state.maximum - maximum).exp()
    sums = torch.cat([state.total * fade, state.weighted * fade], dim=-1)  # [h, q, 1 + dv]
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return PartialSoftmax(maximum, sums[..., :1], sums[..., 1:]).output(scoring)


def ring_attention(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    scoring: Scoring,
    group: Group = None,
) -> Tensor:
    """Attention of this device's queries [h, q, d] over the keys of all: [h, q, dv] float32.

    keys [k, m, d], values [k, m, dv] and positions [m] are this device's part; m may differ, and be 0. Parts go from
    device to device; the next one is on its way while this one is attended to (BurstAttention: Sun et al. 2024,
    arXiv:2403.09347, forward).
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = _lengths(positions, size, group)
    part = [keys.contiguous(), values.contiguous(), positions.contiguous()]
    state = PartialSoftmax.over_nothing(queries.float(), values.shape[-1])
    for step in range(size):
        coming = lengths[(rank - step - 1) % size]
        room = [_room(each, coming) for each in part]
        moving = _passed_on(part, room, rank, size, group) if step + 1 < size else []
        state = state.merged(_state(queries, query_positions, part[0], part[1], part[2], scoring))
        for work in moving:
            work.wait()
        part = room
    return state.output(scoring)


def tree_numbers(heads: int, queries: int, width: int) -> int:
    """Float32 numbers that a device gives to the reductions of `tree_attention`."""
    return heads * queries * (width + 2)


def ring_numbers(kv_heads: int, tokens: int, devices: int, key_width: int, value_width: int) -> int:
    """Numbers of keys and values that a device sends in `ring_attention`, where all hold `tokens` of them."""
    return kv_heads * tokens * (key_width + value_width) * (devices - 1)


def _state(
    queries: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scoring: Scoring
) -> PartialSoftmax:
    """The softmax over this part alone."""
    rows = queries.float() * scoring.scale
    if not positions.numel():
        return PartialSoftmax.over_nothing(rows, values.shape[-1])
    hidden = ~scoring.visible(query_positions, positions)
    offsets = None if scoring.slopes is None else scoring.offsets(query_positions[-1], positions)
    return PartialSoftmax.over(rows, keys, values, scoring, hidden=hidden, offsets=offsets)


def _lengths(positions: Tensor, size: int, group: Group) -> list[int]:
    mine = torch.tensor([positions.numel()], device=positions.device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group)
    return [int(each) for each in every]


def _room(part: Tensor, tokens: int) -> Tensor:
    """For what comes: keys and values have their tokens in the second dimension, positions in the only one."""
    shape = (tokens,) if part.ndim == 1 else (part.shape[0], tokens, part.shape[2])
    return torch.empty(shape, dtype=part.dtype, device=part.device)


def _passed_on(part: list[Tensor], room: list[Tensor], rank: int, size: int, group: Group) -> list[dist.Work]:
    """Begin to send the part to the next device, and to take that of the one before into the room."""
    group = group or dist.group.WORLD
    assert group is not None
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    moves = [dist.P2POp(dist.isend, each, after, group) for each in part if each.numel()]
    moves += [dist.P2POp(dist.irecv, each, before, group) for each in room if each.numel()]
    works: list[dist.Work] = dist.batch_isend_irecv(moves) if moves else []
    return works
