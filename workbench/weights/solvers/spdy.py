"""SPDY: the levels of many parts within one total time, by dynamic programming over coefficients that are searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.core.knapsack import Knapsack
from workbench.progress import Progress


def within_both(costs: Tensor, times: Tensor, room: float, sizes: Tensor, most: int, buckets: int) -> list[int]:
    """The cheapest levels of all parts within a total time and a total size; the last level of each where none are.

    costs: float64 [u, v]; times: float64, sizes: int64 alike, both smaller at later levels. Dynamic programming is over
    the time, at the largest total that the size allows; over the size where no total time does.
    """
    index = torch.arange(costs.shape[0])

    def light(levels: list[int]) -> bool:
        return int(sizes[index, levels].sum()) <= most

    def quick(levels: list[int]) -> bool:
        return float(times[index, levels].sum()) <= room * (1 + 1e-9)

    found = Knapsack(costs, times, room, buckets).within(light)
    found = found or Knapsack(costs, sizes.double(), most, buckets).within(quick)
    return found or [costs.shape[1] - 1] * costs.shape[0]


def searched(
    parts: int,
    score: Callable[[Tensor], float],
    *,
    starts: int,
    patience: int,
    resampled: float,
    seed: int,
    progress: Progress,
) -> Tensor:
    """The coefficients float64 [parts], between 0 and 1, with the lowest score that a local search finds.

    The best of `starts` random ones; then some of its coefficients, at first the share `resampled` of them, are drawn
    again, and one less each time that `patience` draws in a row gained nothing, down to one (Frantar and Alistarh 2022,
    arXiv:2201.13096, section 4.2; IST-DASLab/spdy, spdy.py, 0702e4b). Coefficients that are all alike come first, so
    that what is found is never worse than their dynamic programme.
    """
    draw = torch.Generator().manual_seed(seed)
    best = torch.ones(parts, dtype=torch.float64)
    least = score(best)
    stage = "searching coefficients"
    for _ in progress.track(range(starts), stage, starts):
        trial = torch.rand(parts, generator=draw, dtype=torch.float64)
        if (found := score(trial)) < least:
            best, least = trial, found
    counts: Sequence[int] = range(max(round(resampled * parts), 1), 0, -1)
    for count in progress.track(counts, stage, len(counts)) if patience else ():
        failed = 0
        while failed < patience:
            trial = best.clone()
            trial[torch.randint(parts, (count,), generator=draw)] = torch.rand(
                count, generator=draw, dtype=torch.float64
            )
            if (found := score(trial)) < least:
                best, least, failed = trial, found, 0
            else:
                failed += 1
    return best
