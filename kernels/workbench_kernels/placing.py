"""Where a new token's rows go, each head's to a number of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel


class Beside(NamedTuple):
    """What stands beside a key and value: positions int32 [t, 1] and states float32 [t, w], None to leave them alone,
    of heads with as many rows each.
    """

    positions: Tensor
    states: Tensor | None


def _takes(slots: Tensor, position: Tensor) -> bool:
    return on_gpu(slots, position)


@with_kernel("gpu.placing:place", when=_takes)
def place(
    slots: Tensor,
    position: Tensor,
    first: int | None,
    ends: tuple[Tensor, Tensor],
    rooms: tuple[int, int],
    beside: Beside,
) -> None:
    """Write where a token's key and value go into `ends`, int64 [k] each: row slots[i, head] of each head, whose rows
    begin every `rooms` rows; and beside them its position and a state of zeros.

    slots int64 [n, k or 1]; position int64 [1]; i is how far it is behind `first`, 0 where that is None.
    """
    step = torch.zeros_like(position) if first is None else position - first
    heads = torch.arange(len(ends[0]), device=slots.device)
    slot = slots.index_select(0, step)[0].expand(len(heads))
    for end, room in zip(ends, rooms, strict=True):
        end.copy_(heads * room + slot)
    positions, states = beside
    at = heads * (len(positions) // len(heads)) + slot
    positions.index_copy_(0, at, position.to(positions.dtype).expand(len(heads))[:, None])
    if states is not None:
        states.index_fill_(0, heads * (len(states) // len(heads)) + slot, 0.0)
