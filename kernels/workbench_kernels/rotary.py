"""Rotary embedding: how channels are turned, and its angles as kernels take them, which turn keys themselves."""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

LOW = 256  # positions that the fine table counts


class RotaryTable(NamedTuple):
    """Rotary embedding as a product of two rotations: position p turns by row p % 256 of `low` and p // 256 of `high`.

    low float32 [256, 2, d / 2], high float32 [c, 2, d / 2]: cosines, then sines, of the pairs of channels; lengths
    other than 1 (YaRN, LongRoPE) are in `high`. frequencies float32 [d / 2]: revolutions a position. width: how many of
    the first channels are turned, i with i + width / 2; the others are paired likewise and stay as they are.
    """

    low: Tensor
    high: Tensor
    frequencies: Tensor
    width: int

    @classmethod
    def of(
        cls, rotary: Callable[[Tensor], tuple[Tensor, Tensor]], longest: int, channels: int, device: torch.device
    ) -> RotaryTable | None:
        """For positions below `longest`, of rotary: positions [p] -> (cos, sin) [p, r], r <= channels.

        None if that is not a rotation whose angles are proportional to the position. Waits for the device.
        """
        count = -(-max(longest, 1) // LOW)
        places = torch.cat([torch.arange(LOW, device=device), torch.arange(count, device=device) * LOW])
        last = torch.arange(max(longest, 1) - 1, -1, -max(longest // 8, 1), device=device)  # to test it with
        cos, sin = (x.float() for x in rotary(torch.cat([places, last])))
        width = cos.shape[1]
        if width % 2 or channels % 2 or width > channels:
            return None
        half = torch.stack([cos[:, : width // 2], sin[:, : width // 2]], dim=1)
        size = half[:1].square().sum(dim=1, keepdim=True).sqrt()
        turns = torch.zeros(len(half), 2, channels // 2, device=device)
        turns[:, 0, width // 2 :] = 1
        turns[:, :, : width // 2] = half
        turns[:LOW, :, : width // 2] /= size
        angle = torch.atan2(turns[1, 1].double(), turns[1, 0].double()) / (2 * pi)
        table = cls(turns[:LOW].contiguous(), turns[LOW : LOW + count].contiguous(), angle.float(), width)
        products = torch.stack(table.at(last), dim=1)
        alike = torch.equal(cos[:, : width // 2], cos[:, width // 2 :])
        # The angles of the table itself are float32, and off by so much.
        most = 0.02 + 2.5e-7 * longest
        close = torch.allclose(products, turns[LOW + count :], rtol=0, atol=most)
        return table if alike and close else None

    @property
    def positions(self) -> int:
        """How many positions it covers."""
        return len(self.high) * LOW

    @property
    def order(self) -> Tensor | None:
        """The channels, first those that come first in their pair, int64 [d]; None: as they are."""
        half, channels = self.width // 2, 2 * self.low.shape[2]
        if self.width == channels:
            return None
        middle = (channels + self.width) // 2
        every = torch.arange(channels, device=self.low.device)
        return torch.cat([every[:half], every[self.width : middle], every[half : self.width], every[middle:]])

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [..., d / 2] of positions [...], by the product."""
        low, high = self.low[positions % LOW], self.high[positions // LOW]
        cos = high[..., 0, :] * low[..., 0, :] - high[..., 1, :] * low[..., 1, :]
        return cos, high[..., 1, :] * low[..., 0, :] + high[..., 0, :] * low[..., 1, :]


class Turn(NamedTuple):
    """By how much a query is turned before: row `number`, int64 [1], of cos and sin float32 [n, r], in halves."""

    cos: Tensor
    sin: Tensor
    number: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first r channels of x [..., n, d] turned by the table cos, sin [n, r]: channel i is paired with i + r / 2, as
    in Llama (Su et al. 2021, arXiv:2104.09864); the others stay.
    """
    width = cos.shape[-1]
    first, second = x[..., :width].chunk(2, dim=-1)
    turned = x[..., :width] * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


class Turns(NamedTuple):
    """Rotary embedding at some positions: channel c of a head turned is x[c] * cos[c] + x[partner[c]] * sin[c].

    cos, sin float32 [p, d]: those of the first of a pair negated; partner int32 [d]. Lengths other than 1 are in both.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, channels: int, unhalved: Callable[[Tensor], Tensor]) -> Turns:
        """cos, sin [p, r] of channels in the order of halves; unhalved: to the order of the model's heads."""
        width = cos.shape[1]
        whole = cos.new_ones(len(cos), channels)
        whole[:, :width] = cos
        signed = torch.zeros_like(whole)
        signed[:, :width] = sin
        signed[:, : width // 2] *= -1
        every = torch.arange(channels, device=cos.device)
        other = every.clone()
        other[:width] = (every[:width] + width // 2) % max(width, 1)
        place = unhalved(every[None].float())[0].long()  # where in halves each of the model's channels stands
        model = torch.empty_like(every).index_copy_(0, place, every)
        return cls(unhalved(whole).contiguous(), unhalved(signed).contiguous(), model[other[place]].to(torch.int32))

    def __call__(self, x: Tensor, at: Tensor, *, back: bool = False) -> Tensor:
        """x [..., d] float32 turned by row `at` [1], or turned back."""
        cos, sin = self.cos[at], self.sin[at]
        if back:
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        return x * cos + x[..., self.partner.long()] * sin
