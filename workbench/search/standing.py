"""Who is in front, and who goes on: fronts of several figures, and successive halving over cases."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T", bound=Hashable)

ETA = 3  # one in so many goes on to more cases, and those are so many times as many


def dominated(figures: Sequence[Sequence[float]]) -> list[bool]:
    """Which points others beat: by no worse in any figure and better in one, the less the better."""
    points = np.asarray(figures, dtype=float)
    if not len(points):
        return []
    no_worse = (points[None] <= points[:, None]).all(axis=-1)  # [of, by]
    better = (points[None] < points[:, None]).any(axis=-1)
    beaten: list[bool] = np.logical_and(no_worse, better).max(axis=1).tolist()
    return beaten


def layers(figures: Sequence[Sequence[float]]) -> list[int]:
    """The number of each point's front: 0 of those that no other beats, 1 of those that only these beat, and so on."""
    found, left = [0] * len(figures), list(range(len(figures)))
    number = 0
    while left:
        behind = dominated([figures[index] for index in left])
        for index, beaten in zip(left, behind, strict=True):
            if not beaten:
                found[index] = number
        left = [index for index, beaten in zip(left, behind, strict=True) if beaten]
        number += 1
    return found


def rungs(cases: int, first: int = 1) -> list[int]:
    """On how many cases recipes are measured: `first`, then a third of all where that is more, then all.

    >>> rungs(12, 2)
    [2, 4, 12]
    """
    steps = (min(first, cases), cases // ETA, cases)
    return sorted({step for step in steps if step >= min(first, cases)})


def promoted(order: Sequence[T], on: Mapping[T, int], rung: int) -> list[T]:
    """Who goes on from a rung, best first: of those that were measured there the best third, but for those who went on
    before.

    order: everyone, best first, as judged on the rung's cases. on: the rung that each was measured on last. This is
    successive halving that never waits for others (Li et al. 2020, arXiv:1810.05934, algorithm 2).
    """
    measured = [each for each in order if on[each] >= rung]
    best = measured[: math.ceil(len(measured) / ETA)]
    return [each for each in best if on[each] == rung]
