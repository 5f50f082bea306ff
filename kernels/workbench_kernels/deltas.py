"""Decode attention over rows held as deltas: of each channel only the tokens at which it moved."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.limits import WIDEST_DELTAS
from workbench_kernels.packing import unpack
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state


class DeltaRows(NamedTuple):
    """Blocks of `group` rows of several heads, each as a line of numbers [b, d + count] and of bits uint8 [b, c].

    Numbers are, channel after channel, the first and each that differs from the one before; bits, as `pack` lays them
    out at 1 bit, say of the later rows of each channel which those are.
    """

    numbers: Ragged
    bits: Ragged
    channels: int
    group: int

    def padded(self) -> tuple[Tensor, Tensor]:
        """All rows [k, longest * g, d], and which are real [k, longest * g]; others are anything."""
        numbers, real = self.numbers.padded()
        bits, _ = self.bits.padded()
        rows = restored(numbers.flatten(0, 1), bits.flatten(0, 1), self.channels, self.group)
        return rows.unflatten(0, numbers.shape[:2]).flatten(1, 2), real.repeat_interleave(self.group, dim=1)


def restored(numbers: Tensor, bits: Tensor, width: int, group: int) -> Tensor:
    """What blocks of numbers [b, d + count] and bits stand for, [b, g, d]."""
    moved = unpack(bits, 1, width * (group - 1)).view(-1, width, group - 1)
    stored = torch.nn.functional.pad(moved, (1, 0), value=1)
    # Every set bit is one number further: a channel that did not move stays at its last one. (Rows that hold nothing
    # may have any bits.)
    place = stored.flatten(1).cumsum(dim=1).sub_(1).clamp_max_(numbers.shape[1] - 1)
    return numbers.gather(1, place).view(-1, width, group).transpose(1, 2)


def _takes(query: Tensor, keys: DeltaRows, values: DeltaRows | Ragged, scoring: Scoring) -> bool:
    data = values.numbers.data if isinstance(values, DeltaRows) else values.data
    fits = keys.group & (keys.group - 1) == 0 and keys.group >= 16
    width = max(keys.channels, values.channels if isinstance(values, DeltaRows) else values.data.shape[1])
    here = on_gpu(query, keys.numbers.data, data) and scoring.in_kernels
    return here and fits and query.dtype.itemsize == 2 and width * keys.group <= WIDEST_DELTAS


@with_kernel("gpu.deltas:decode_deltas", when=_takes)
def decode_deltas(
    query: Tensor, keys: DeltaRows, values: DeltaRows | Ragged, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Softmax attention of query [h, q, d] over all rows of the keys' blocks, with values in blocks alike or whole,
    [t, dv], of which there may be more; h = g * k, all of one dtype. All queries see everything.

    Returns the output [h, q, dv] in the query's dtype and the log-sum-exp float32 [h, q].
    """
    key, real = keys.padded()
    value = values.padded()[0][:, : key.shape[1]]
    value = torch.nn.functional.pad(value, (0, 0, 0, key.shape[1] - value.shape[1]))
    return attention_state(query, key, value, real[:, None], scoring)
