"""Bisection: where a condition that holds up to some number ceases to hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number of [low, high) that fits; `low` where none does.

    Below a number that fits all must fit. Neither end is tried.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_each(fits: Callable[[Tensor], Tensor], low: Tensor, high: int) -> Tensor:
    """The same for many numbers at once, int64 of any shape: `fits` says of each whether it does, bool of that shape.

    One step more or less a number is nothing beside waiting for a device, so all take as many.
    """
    beyond = torch.full_like(low, high)
    for _ in range(high.bit_length()):
        middle = (low + beyond) // 2
        fitting = fits(middle)
        low, beyond = torch.where(fitting, middle, low), torch.where(fitting, beyond, middle)
    return low


def boundary(
    fits: Callable[[float], bool], inside: float, outside: float, *, steps: int = 60, tolerance: float = 0.0
) -> float:
    """The number nearest to `outside` that fits, where what fits lies on the side of `inside`.

    Halves the distance `steps` times, fewer where it comes within `tolerance`. Neither end is tried, so it is `inside`
    where nothing nearer fits.
    """
    for _ in range(steps):
        if abs(outside - inside) <= tolerance:
            break
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside
