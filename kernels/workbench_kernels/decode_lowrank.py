"""Decode attention over a cache held as coefficients in low-rank spaces."""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.decode import decode_dense
from workbench_kernels.dispatch import on_gpu
from workbench_kernels.rows import Ragged
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state

LOW = 256  # positions that the fine table counts


class Turns(NamedTuple):
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
    ) -> Turns | None:
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
        held = torch.zeros(len(half), 2, channels // 2, device=device)
        held[:, 0, width // 2 :] = 1
        held[:, :, : width // 2] = half
        held[:LOW, :, : width // 2] /= size
        angle = torch.atan2(held[1, 1].double(), held[1, 0].double()) / (2 * pi)
        turns = cls(held[:LOW].contiguous(), held[LOW : LOW + count].contiguous(), angle.float(), width)
        found = torch.stack(turns.table(last), dim=1)
        alike = torch.equal(cos[:, : width // 2], cos[:, width // 2 :])
        # The angles of the table itself are float32, and off by so much.
        most = 0.02 + 2.5e-7 * longest
        close = torch.allclose(found, held[LOW + count :], rtol=0, atol=most)
        return turns if alike and close else None

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

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [..., d / 2] of positions [...], by the product."""
        low, high = self.low[positions % LOW], self.high[positions // LOW]
        cos = high[..., 0, :] * low[..., 0, :] - high[..., 1, :] * low[..., 1, :]
        return cos, high[..., 1, :] * low[..., 0, :] + high[..., 0, :] * low[..., 1, :]


def decode_lowrank(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    turns: Turns | None = None,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of query [h, q, d] over keys and values that are given by coefficients; h = g * k.

    A key is its row of keys [t, rk] times key_basis [k, rk, d], a value its row of values [t, rv] times value_basis
    [k, rv, dv], all of one dtype. turns: keys are then rotated to their positions, which are int32 [t, 1], or their
    number in their head. query_positions int [q]: queries see rows at positions up to their own; without, everything.
    Returns the output [h, q, dv] and, with `lse`, each query's log-sum-exp float32 [h, q].

    Without `turns` queries are projected into the space ("Eigen Attention", Saxena et al. 2024, arXiv:2408.05646), so
    that only coefficients are read. With them each key leaves its space: 2 * rk * d operations a token and KV head for
    2 * (rk + rv) bytes of 16-bit numbers. That is d / 2 operations a byte where both ranks are alike, 64 for d = 128: a
    third of what an H200's matrix units do in the time that the bytes take, so that the memory still decides; it is
    bound by arithmetic for d of 256 and key ranks above about twice the value ranks. Values never leave theirs, but
    for their weighted sum.
    """
    if turns is None:
        heads, count, width = query.shape
        asked = query.reshape(key_basis.shape[0], -1, width) @ key_basis.to(query.dtype).transpose(1, 2)
        out, sums = decode_dense(
            asked.reshape(heads, count, -1), keys, values, scoring, query_positions=query_positions,
            positions=positions, lse=lse,
        )  # fmt: skip
        return _left(out, value_basis), sums
    alike = query.dtype == keys.data.dtype and query.dtype.itemsize == 2
    if on_gpu(query, keys.data) and alike and scoring.window is None:  # the kernel knows no window
        from workbench_kernels.gpu.lowrank_decode import decode_rotated

        out, sums = decode_rotated(
            query, keys, values, key_basis, turns, scoring, query_positions=query_positions, positions=positions,
            lse=lse,
        )  # fmt: skip
        return _left(out, value_basis), sums
    return decode_lowrank_reference(
        query, keys, values, key_basis, value_basis, scoring, query_positions=query_positions, positions=positions,
        turns=turns,
    )  # fmt: skip


def decode_lowrank_reference(
    query: Tensor,
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    value_basis: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    positions: Ragged | None = None,
    turns: Turns | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with all keys out of their space, in float32, or float64 if the query is."""
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    coefficients, real = keys.padded()
    key = torch.where(real[..., None], coefficients.to(kind), 0) @ key_basis.to(kind)
    if positions is None:
        places = torch.arange(keys.longest, device=query.device)[None]
    else:
        places = positions.padded()[0][..., 0].long()
    if turns is not None:
        cos, sin = (x.to(kind) for x in turns.table(places))
        order = turns.order
        first, second = (key if order is None else key[..., order]).chunk(2, dim=-1)
        key = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        query = query if order is None else query[..., order]
    seen = real[:, None]
    if query_positions is not None:
        seen = seen & scoring.visible(query_positions.to(query.device), places)
    value = torch.where(real[..., None], values.padded()[0].to(kind), 0)
    out, sums = attention_state(query, key, value, seen, scoring)
    return _left(out, value_basis), sums


def _left(out: Tensor, basis: Tensor) -> Tensor:
    """Outputs [h, q, rv] in the space of basis [k, rv, dv], out of it."""
    heads, count, rank = out.shape
    return (out.reshape(basis.shape[0], -1, rank) @ basis.to(out.dtype)).reshape(heads, count, -1)
