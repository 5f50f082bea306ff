"""Evolutionary search for the levels of many parts under one total, as EvoPress does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.progress import Progress

Mutate = Callable[[Tensor, torch.Generator], Tensor]
Measure = Callable[[Tensor, Sequence[int]], float]


class Step(NamedTuple):
    """One step of a selection: on how many samples candidates are measured, and how many of them go on."""

    samples: int
    survivors: int


class Found(NamedTuple):
    """The best levels, how unfit they are, and how unfit the start was: on all samples, the less the better."""

    levels: Tensor
    unfitness: float
    before: float


def steps(offspring: int, samples: int) -> list[Step]:
    """Selection in steps: each lets a quarter of the candidates go on to four times as many samples, the last one has
    all of them.

        >>> steps(16, 16)
        [Step(samples=1, survivors=4), Step(samples=4, survivors=1), Step(samples=16, survivors=1)]
    """
    survivors = [offspring]
    while survivors[-1] > 1:
        survivors.append(max(survivors[-1] // 4, 1))
    sizes = [max(samples // 4**left, 1) for left in range(len(survivors) - 1, 0, -1)]
    found = [Step(size, count) for size, count in zip(sizes, survivors[1:], strict=True) if size < samples]
    return [*found, Step(samples, 1)]


def evolve(
    start: Tensor,
    mutate: Mutate,
    measure: Measure,
    *,
    samples: int,
    generations: int,
    offspring: int,
    seed: int,
    progress: Progress,
    stage: str,
) -> Found:
    """The fittest levels int64 [u] that (1 + λ) evolution finds from `start` (Sieberling et al. 2025, algorithm 1).

    In each generation the parent has `offspring` children, changed by `mutate` within what is allowed. `measure` says
    how unfit levels are on some samples; samples grow in steps, on which the less fit drop out (`steps`), and the
    parent joins the last one. The paper draws the last step's samples anew in each generation, from a corpus of
    millions of tokens; here it has all `samples` there are, so that what is found is never less fit on them than the
    start. Samples of earlier steps are drawn in each generation.
    """
    draw = torch.Generator().manual_seed(seed)
    everything = range(samples)
    parent = start.clone()
    before = best = measure(parent, everything)
    for _ in progress.track(range(generations), stage, generations):
        children = [mutate(parent, draw) for _ in range(offspring)]
        rivals = [child for child in children if not torch.equal(child, parent)]
        for step in steps(len(rivals), samples)[:-1] if rivals else ():
            seen = torch.randperm(samples, generator=draw)[: step.samples].tolist()
            unfit = torch.tensor([_checked(progress, measure, child, seen) for child in rivals])
            rivals = [rivals[index] for index in unfit.argsort(stable=True)[: step.survivors].tolist()]
        for child in rivals:
            unfitness = _checked(progress, measure, child, everything)
            if unfitness < best:
                parent, best = child, unfitness
    return Found(parent, best, before)


def _checked(progress: Progress, measure: Measure, levels: Tensor, seen: Sequence[int]) -> float:
    progress.check()
    unfitness = measure(levels, seen)
    return math.inf if math.isnan(unfitness) else unfitness  # not a number: as unfit as can be


# -- levels with a size each


def switched(levels: Tensor, sizes: Tensor, limit: int, draw: torch.Generator) -> Tensor:
    """A level-switch mutation: some parts a level higher, others lower, so that the total stays within the limit.

    levels: int64 [u]. sizes: int64 [u, v], of each part at each level, ascending. One to three switches, fewer more
    likely (section 3). The paper switches between parts of equal size; here any parts may, and as many are lowered as
    it takes; what room that leaves is filled (`filled`).
    """
    levels = levels.clone()
    for _ in range(int(torch.randint(1, 4, (2,), generator=draw).min())):
        raised = _one(levels < sizes.shape[1] - 1, draw)
        if raised is None:
            break
        trial = levels.clone()
        trial[raised] += 1
        others = torch.ones_like(levels, dtype=torch.bool)
        others[raised] = False
        while total(trial, sizes) > limit:
            lowered = _one((trial > 0) & others, draw)
            if lowered is None:
                break
            trial[lowered] -= 1
        if total(trial, sizes) <= limit:
            levels = trial
    return filled(levels, sizes, limit, draw)


def filled(levels: Tensor, sizes: Tensor, limit: int, draw: torch.Generator) -> Tensor:
    """The same levels [u] with parts raised, drawn at random, until none fits any more."""
    levels = levels.clone()
    top = sizes.shape[1] - 1
    while True:
        growth = sizes.gather(1, (levels + 1).clamp_max(top)[:, None])[:, 0] - sizes.gather(1, levels[:, None])[:, 0]
        raised = _one((levels < top) & (growth <= limit - total(levels, sizes)), draw)
        if raised is None:
            return levels
        levels[raised] += 1


def exchanges(levels: Tensor, slopes: Tensor, sizes: Tensor, limit: int) -> list[Tensor]:
    """Levels [u] after one, two, ... exchanges: the part that gains most a byte is raised, those that lose least a byte
    are lowered for it, as long as that is a gain if their changes add up.

    slopes: float [u, 2], the change of what is minimised when one part alone is a level lower, and a level higher.
    """
    index = torch.arange(levels.numel())
    top = sizes.shape[1] - 1
    shrink = sizes[index, levels] - sizes[index, (levels - 1).clamp_min(0)]
    growth = sizes[index, (levels + 1).clamp_max(top)] - sizes[index, levels]
    loss = torch.where(levels > 0, slopes[:, 0], torch.inf) / shrink.clamp_min(1)
    gain = torch.where(levels < top, -slopes[:, 1], -torch.inf) / growth.clamp_min(1)
    rising = gain.argsort(descending=True, stable=True).tolist()
    falling = loss.argsort(stable=True).tolist()
    found, moved = [], set[int]()
    now = levels.clone()
    for raised in rising:
        if raised in moved or gain[raised] <= 0:
            continue
        trial, cost, lowered = now.clone(), 0.0, []
        trial[raised] += 1
        for part in falling:
            if total(trial, sizes) <= limit:
                break
            if part != raised and part not in moved and loss[part] < torch.inf:
                trial[part] -= 1
                lowered.append(part)
                cost += float(slopes[part, 0])
        if total(trial, sizes) > limit or cost >= -float(slopes[raised, 1]):
            break
        now = trial
        moved |= {raised, *lowered}
        found.append(now)
    return found


def promising(
    even: Tensor, before: float, slopes: Tensor, sizes: Tensor, limit: int, measure: Callable[[Tensor], float]
) -> Tensor:
    """Where a search of few generations begins: of levels on the way of exchanges, and `even` itself, the least unfit.

    An eighth, a quarter, half and all of the exchanges are measured. before: how unfit `even` is. slopes: as in
    `exchanges`.
    """
    way = exchanges(even, slopes, sizes, limit)
    places = sorted({len(way) * part // 8 for part in (1, 2, 4, 8)} - {0})
    tried = [(before, even), *((measure(way[place - 1]), way[place - 1]) for place in places)]
    return min(tried, key=lambda pair: pair[0])[1]


def uniform(sizes: Tensor, limit: int) -> Tensor:
    """The highest level that all parts can have within the limit, int64 [u]; the lowest where none fits."""
    fitting = (sizes.sum(dim=0) <= limit).nonzero()[:, 0]
    level = int(fitting[-1]) if fitting.numel() else 0
    return torch.full((sizes.shape[0],), level)


def total(levels: Tensor, sizes: Tensor) -> int:
    """The size of all parts together at these levels."""
    return int(sizes.gather(1, levels[:, None]).sum())


def _one(able: Tensor, draw: torch.Generator) -> int | None:
    """One of the parts where `able` [u] is true; None where it nowhere is."""
    choice = able.nonzero()[:, 0]
    return int(choice[torch.randint(choice.numel(), (1,), generator=draw)]) if choice.numel() else None
