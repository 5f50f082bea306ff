"""The kernel for what `workbench_kernels.placing` says: one small program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power


@triton.jit
def _place(
    slots, position, first, key_ends, value_ends, key_room, value_room, positions, place_room, states, state_room,
    HEADS: tl.constexpr, K: tl.constexpr, ALIKE: tl.constexpr, STEPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, K)
    there = head < HEADS
    at = tl.load(position)
    line = (at - first) if STEPS else 0
    slot = tl.load(slots + (line + head * 0 if ALIKE else line * HEADS + head), mask=there, other=0)
    wide = head.to(tl.int64)
    tl.store(key_ends + head, wide * key_room + slot, mask=there)
    tl.store(value_ends + head, wide * value_room + slot, mask=there)
    tl.store(positions + wide * place_room + slot, tl.zeros([K], tl.int32) + at.to(tl.int32), mask=there)
    if W > 0:  # else there are no states, and what is never run would be compiled
        for number in range(W):
            tl.store(states + (wide * state_room + slot) * W + number, tl.zeros([K], tl.float32), mask=there)


def place(
    slots: Tensor,
    position: Tensor,
    first: int | None,
    ends: tuple[Tensor, Tensor],
    rooms: tuple[int, int],
    beside: tuple[Tensor, Tensor | None],
) -> None:
    """See `workbench_kernels.placing.place`."""
    heads, (positions, states) = len(ends[0]), beside
    _place[(1,)](
        slots.contiguous(), position, first or 0, *ends, *rooms, positions, len(positions) // heads,
        states, 0 if states is None else len(states) // heads,
        HEADS=heads, K=power(heads), ALIKE=slots.shape[1] == 1, STEPS=first is not None,
        W=0 if states is None else states.shape[1], num_warps=1,
    )  # fmt: skip
