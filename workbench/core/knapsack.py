"""Levels of many parts within one total size, at the least sum of costs: the multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from workbench.core.bisection import largest

_BUCKETS = 4096  # most steps in which sizes are counted


class Knapsack:
    """The cheapest levels of all parts for every total size up to `room`, by dynamic programming.

    costs: float64 [u, v], of each part at each level. sizes: float64 [u, v]; bytes, or seconds. Sizes are counted in
    `buckets` steps of equal length, rounded up, so that no total is beyond `room`.
    """

    def __init__(self, costs: Tensor, sizes: Tensor, room: float, buckets: int) -> None:
        self._steps = (sizes / room * buckets - 1e-9).ceil().clamp_min(0).long()
        best = torch.full((buckets + 1,), torch.inf, dtype=torch.float64)
        best[0] = 0.0
        self._chosen = torch.full((costs.shape[0], buckets + 1), -1, dtype=torch.int16)
        for part, (row, steps) in enumerate(zip(costs, self._steps.tolist(), strict=True)):
            now = torch.full_like(best, torch.inf)
            for level, step in enumerate(steps):
                if step > buckets:
                    continue
                reached = best[: buckets + 1 - step] + row[level]
                better = reached < now[step:]
                now[step:][better] = reached[better]
                self._chosen[part, step:][better] = level
            best = now
        self._best = best

    def within(self, fits: Callable[[list[int]], bool]) -> list[int] | None:
        """The cheapest levels of the largest total size at which they fit; None where those of no size do.

        fits: whether levels are within another limit, which those of less size are rather than those of more.
        """
        cheapest = self._best.cummin(dim=0).indices  # [buckets + 1]: where the cheapest within each total size stand
        reached = (self._best < torch.inf).nonzero()[:, 0].tolist()
        if not reached or not fits(self._levels(reached[0])):
            return None
        last = largest(lambda at: fits(self._levels(int(cheapest[at]))), reached[0], len(cheapest))
        return self._levels(int(cheapest[last]))

    def _levels(self, at: int) -> list[int]:
        levels = []
        for part in range(len(self._chosen) - 1, -1, -1):
            levels.append(int(self._chosen[part, at]))
            at -= int(self._steps[part, levels[-1]])
        return levels[::-1]


def cheapest(costs: Tensor, sizes: Tensor, limit: int) -> Tensor:
    """The levels int64 [u] of the least sum of costs within `limit`; the smallest of all where they do not fit.

    costs: float [u, v], of each part at each level. sizes: int64 [u, v], ascending. Room that counting in steps left
    over goes where the next level gains most.
    """
    index = torch.arange(costs.shape[0])
    smallest = torch.zeros_like(index)
    growth = sizes - sizes[:, :1]
    room = limit - int(sizes[:, 0].sum())
    unit = math.gcd(*growth.flatten().tolist())
    if not unit or room < unit:
        return smallest
    steps = room // unit  # exact, where there are few enough of them
    knapsack = Knapsack(costs.double(), growth.double() / unit, steps, min(steps, _BUCKETS))
    levels = torch.tensor(knapsack.within(lambda _: True))
    levels = (costs <= costs[index, levels][:, None]).long().argmax(dim=1)  # the smallest of those that cost no more
    top = sizes.shape[1] - 1
    while True:
        above = (levels + 1).clamp_max(top)
        gain = costs[index, levels] - costs[index, above]
        spare = limit - int(sizes[index, levels].sum())
        gain[(levels == top) | (sizes[index, above] - sizes[index, levels] > spare)] = -torch.inf
        best = int(gain.argmax())
        if gain[best] <= 0:
            return levels
        levels[best] += 1
