"""Rows of several heads in one buffer, as kernels take them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench_kernels.packing import unpack

Axis = Literal["channel", "token"]
"""along what quantised rows share scales: a channel of several rows, or several channels of a row (a token)"""


class Ragged(NamedTuple):
    """Head i owns data[starts[i] : starts[i] + lengths[i]].

    data [t, w], contiguous; starts and lengths int32 [k] on the same device; longest: no length is larger. Batch is
    simply more heads.
    """

    data: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, x: Tensor) -> Ragged:
        """All rows of x [k, n, w]."""
        heads, count, _ = x.shape
        starts = torch.arange(0, heads * count, count, dtype=torch.int32, device=x.device)
        lengths = torch.full((heads,), count, dtype=torch.int32, device=x.device)
        return cls(x.reshape(heads * count, -1).contiguous(), starts, lengths, count)

    def padded(self) -> tuple[Tensor, Tensor]:
        """The rows [k, longest, w], heads that are shorter filled up with anything, and which are real [k, longest]."""
        steps = torch.arange(self.longest, device=self.data.device)
        real = steps < self.lengths[:, None]
        at = self.starts.long()[:, None] + torch.where(real, steps, 0)
        return self.data[at.clamp_max(max(self.data.shape[0] - 1, 0))], real


class PackedRows(NamedTuple):
    """Rows of several heads, the first of each quantised in groups, the newest whole behind them.

    codes uint8 [t, b] as `pack` lays them out; scale and zero float16, alike: axis "channel": [t', d], a row for
    `group` consecutive rows of a head; axis "token": [t', ceil(d / group)], a row for each row. tail [t'', d].
    zero None, for axis "token": codes stand around 2 ** (bits - 1), and scales may be bfloat16 or float8_e4m3fn too.
    balance float16 [k, d] or None: what a head's channels were multiplied with before they were quantised.
    """

    codes: Ragged
    scale: Ragged
    zero: Ragged | None
    tail: Ragged
    bits: int
    group: int
    axis: Axis
    balance: Tensor | None = None

    @property
    def longest(self) -> int:
        """No head has more rows."""
        return self.codes.longest + self.tail.longest

    def padded(self) -> tuple[Tensor, Tensor]:
        """What the rows stand for, float32 [k, longest, d], filled up likewise, and which are real [k, longest]."""
        width = self.tail.data.shape[1]
        codes, packed = self.codes.padded()
        codes = unpack(codes, self.bits, width)
        scale = self.scale.padded()[0].float()
        zero = -(2.0 ** (self.bits - 1)) * scale if self.zero is None else self.zero.padded()[0].float()
        if self.axis == "channel":
            each = torch.arange(codes.shape[1], device=codes.device) // self.group
            scale, zero = (
                scale[:, each.clamp_max(max(scale.shape[1] - 1, 0))],
                zero[:, each.clamp_max(max(zero.shape[1] - 1, 0))],
            )
        else:
            each = torch.arange(width, device=codes.device) // self.group
            scale, zero = scale[..., each], zero[..., each]
        front = torch.addcmul(zero, codes.float(), scale)
        if self.balance is not None:
            front = front / self.balance.float()[:, None]
        tail, whole = self.tail.padded()
        # Each head's tail follows its own packed rows.
        both, real = torch.cat([front, tail.float()], dim=1), torch.cat([packed, whole], dim=1)
        order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        return both.gather(1, order[..., None].expand_as(both)), real.gather(1, order)


class SparseRows(NamedTuple):
    """Rows of several heads of which each keeps c numbers, the newest whole behind them.

    numbers [t, c]; bitmap uint8 [t, ceil(d / 8)]: bit i of byte b is set where the row has a number at channel
    b + ceil(d / 8) * i, in exactly c places; numbers are in the order of their bits, byte after byte. tail [t', d].
    """

    numbers: Ragged
    bitmap: Ragged
    tail: Ragged

    @property
    def longest(self) -> int:
        """No head has more rows."""
        return self.numbers.longest + self.tail.longest


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
