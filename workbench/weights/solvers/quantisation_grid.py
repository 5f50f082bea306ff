"""Rounding to a grid: scales, zeros and codes of groups of neighbouring columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.core.precision import half

_NORM = 2.4  # the power of a change that a range search adds up
_SHRINKS = tuple(1 - step / 100 for step in range(80))  # the shares of a range that it tries


class Grid(NamedTuple):
    """Where the levels of each group lie: the weight of a code is (code - zero) * scale.

    scale: [o, g], as float16 holds them. zero: [o, g] whole numbers from 0 to 2 ** bits - 1; 2 ** (bits - 1) where the
    grid is symmetric. group: neighbouring columns that share them; the last group of a row may be shorter.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of weight [o, i], uint8."""
        scale, zero = (self.spread(part, weight.shape[1]) for part in (self.scale, self.zero))
        return (weight.float() / scale).round_().add_(zero).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def dequantised(self, codes: Tensor) -> Tensor:
        """What codes [o, i] stand for, float32."""
        scale, zero = (self.spread(part, codes.shape[1]) for part in (self.scale, self.zero))
        return (codes.float() - zero) * scale

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest levels to weight [o, i], float32."""
        return self.dequantised(self.codes(weight))

    def spread(self, part: Tensor, columns: int) -> Tensor:
        """A scale or zero for each column: [o, g] to [o, i]."""
        return part.repeat_interleave(self.group, dim=1)[:, :columns]


def fit(
    weight: Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    every_level: bool = False,
    shrink: Tensor | float = 1.0,
) -> Grid:
    """The grid between each group's own ends: its minimum and maximum, zero always among the levels.

    weight: [o, i]. symmetric: from minus to plus the largest magnitude, which is the highest level; so the lowest of
    the 2 ** bits, beyond minus that magnitude, stays unused. every_level: a symmetric grid uses all of them, with steps
    of twice the largest magnitude over 2 ** bits - 1 (GPTQ's code, compressed-tensors): the largest magnitude itself is
    half a step beyond the highest level, or short of the lowest. shrink: the share of that range which is covered, one
    number or [o, g]: what lies beyond is rounded to the ends.
    """
    rows = pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))  # zeros change no range
    low, high = rows.amin(dim=-1).clamp_max_(0) * shrink, rows.amax(dim=-1).clamp_min_(0) * shrink
    steps = 2**bits - 1
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = stored_scale(torch.maximum(high, -low) / (steps / 2 if every_level else max(middle - 1, 0.5)))
        return Grid(scale, torch.full_like(scale, middle), bits, group)
    scale = stored_scale((high - low) / steps)
    return Grid(scale, (-low / scale).round_().clamp_(0, steps), bits, group)


def fit_least(
    weight: Tensor,
    bits: int,
    group: int,
    shrinks: Sequence[float],
    loss: Callable[[Tensor], Tensor],
    *,
    symmetric: bool = False,
    every_level: bool = False,
) -> Grid:
    """The grid that covers whichever share of its range makes rounding weight [o, i] hurt least, each group by itself.

    shrinks: the shares that are tried, the first of them where several are equal. loss: what a change of the weight
    [o, i] costs in each group [o, g].
    """
    fitted = partial(fit, weight, bits, group, symmetric=symmetric, every_level=every_level)
    chosen = torch.full((weight.shape[0], -(-weight.shape[1] // group)), shrinks[0], device=weight.device)
    least = torch.full_like(chosen, torch.inf)
    for shrink in shrinks:
        cost = loss(fitted(shrink=shrink).nearest(weight).sub_(weight))
        chosen = torch.where(cost < least, shrink, chosen)
        least = torch.minimum(least, cost)
    return fitted(shrink=chosen)


def fit_range(weight: Tensor, bits: int, group: int, *, symmetric: bool = False, every_level: bool = False) -> Grid:
    """The grid whose range changes weight [o, i] least of all from its whole down to a fifth, each group by itself, by
    the sum of |change| to the power 2.4.

    As the `mse` of GPTQ's code does it (IST-DASLab/gptq, quant.py, 2e22596: norm=2.4, grid=100, maxshrink=.8).
    """

    def loss(change: Tensor) -> Tensor:
        costs = change.abs_().pow_(_NORM)
        sums: Tensor = pad(costs, (0, -change.shape[1] % group)).unflatten(1, (-1, group)).sum(dim=-1)
        return sums

    return fit_least(weight, bits, group, _SHRINKS, loss, symmetric=symmetric, every_level=every_level)


def squares(change: Tensor, group: int) -> Tensor:
    """The sum of squares of a change [o, i] in each group [o, g]."""
    sums: Tensor = pad(change.square(), (0, -change.shape[1] % group)).unflatten(1, (-1, group)).sum(dim=-1)
    return sums


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as float16 holds them, never zero: codes are chosen for what is stored. Raises OutOfRange beyond that."""
    return half(scale, "its scales").clamp_min_(torch.finfo(torch.float16).tiny).float()
