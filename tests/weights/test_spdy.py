"""SPDY: the cheapest levels within a total time, against all there are; coefficients that are searched."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.weights.support import seeded
from workbench.core.knapsack import Knapsack
from workbench.errors import Cancelled
from workbench.progress import Progress
from workbench.weights.solvers.latency import ProductTimes
from workbench.weights.solvers.spdy import searched, within_both
from workbench.weights.solvers.widths import ladders


def problem(seed: int, parts: int = 4, levels: int = 3) -> tuple[Tensor, Tensor]:
    """Costs that rise and times that fall from level to level, [u, v]."""
    draw = seeded(seed)
    costs = torch.rand(parts, levels, generator=draw, dtype=torch.float64).cumsum(dim=1)
    times = torch.randint(0, 6, (parts, levels), generator=draw).flip(1).cumsum(dim=1).flip(1)
    return costs, times.double()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("room", [3, 8, 20])
def test_no_other_levels_within_the_time_cost_less(seed: int, room: int) -> None:
    costs, times = problem(seed)
    every = itertools.product(range(3), repeat=4)
    within = [levels for levels in every if sum(float(times[u, v]) for u, v in enumerate(levels)) <= room]
    found = Knapsack(costs, times, room, room).within(lambda _: True)  # a step for each unit of time: nothing rounds up
    if not within:
        assert found is None
        return
    assert found is not None and tuple(found) in within
    least = min(sum(float(costs[u, v]) for u, v in enumerate(levels)) for levels in within)
    assert sum(float(costs[u, v]) for u, v in enumerate(found)) == pytest.approx(least)


def test_levels_within_coarse_steps_are_never_beyond_the_time() -> None:
    for seed in range(20):
        costs, times = problem(seed)
        times = times + torch.rand(times.shape, generator=seeded(seed), dtype=torch.float64)
        found = Knapsack(costs, times, 12.0, 7).within(lambda _: True)
        assert found is None or sum(float(times[u, v]) for u, v in enumerate(found)) <= 12


def test_another_limit_is_met_at_the_largest_time_that_meets_it() -> None:
    costs, times = problem(3)

    def total(levels: list[int]) -> float:
        return sum(float(times[u, v]) for u, v in enumerate(levels))

    table = Knapsack(costs, times, 40, 40)
    alone = Knapsack(costs, times, 20, 20).within(lambda _: True)
    found = table.within(lambda levels: total(levels) <= 20)
    assert alone is not None and found == alone
    assert table.within(lambda _: False) is None


def test_levels_within_a_time_and_a_size_are_within_both() -> None:
    for seed in range(12):
        costs, times = problem(seed)
        sizes = problem(seed + 50)[1].long() + torch.tensor([2, 1, 0])
        room, most = float(times[:, 1].sum()) + 1e-6, int(sizes[:, 1].sum())
        levels = within_both(costs, times, room, sizes, most, 500)
        assert sum(int(sizes[u, v]) for u, v in enumerate(levels)) <= most
        assert sum(float(times[u, v]) for u, v in enumerate(levels)) <= room * (1 + 1e-9)
    free = torch.zeros_like(times)  # nothing takes time: only the size counts, and it is met
    levels = within_both(costs, free, 1.0, sizes, most, 500)
    assert sum(int(sizes[u, v]) for u, v in enumerate(levels)) <= most


def test_the_search_keeps_the_best_it_saw_and_asks_for_few_changes_last() -> None:
    asked: list[Tensor] = []

    def score(coefficients: Tensor) -> float:
        asked.append(coefficients.clone())
        return float((coefficients - torch.tensor([0.2, 0.9, 0.5, 0.1])).abs().sum())

    options = {"starts": 10, "patience": 20, "resampled": 0.5, "progress": Progress()}
    best = searched(4, score, seed=1, **options)  # type: ignore[arg-type]
    assert torch.equal(asked[0], torch.ones(4).double())
    assert score(best) == min(map(score, list(asked))) < 0.5
    again = searched(4, score, seed=1, **options)  # type: ignore[arg-type]
    assert torch.equal(best, again) and not torch.equal(best, searched(4, score, seed=2, **options))  # type: ignore[arg-type]
    alone = searched(4, score, starts=0, patience=0, resampled=0.5, seed=0, progress=Progress())
    assert torch.equal(alone, torch.ones(4).double())


def test_a_search_can_be_cancelled() -> None:
    progress = Progress()

    def score(_: Tensor) -> float:
        progress.cancel()
        return 1.0

    with pytest.raises(Cancelled):
        searched(4, score, starts=3, patience=3, resampled=0.5, seed=0, progress=progress)


def test_times_between_recorded_shapes_are_interpolated_and_without_any_are_multiply_adds() -> None:
    times = ProductTimes({(8, 4): 1.0, (2, 4): 0.4, (8, 2): 0.6})
    assert times.of(8, 4) == 1.0 and times.of(5, 4) == pytest.approx(0.7) and times.of(8, 3) == pytest.approx(0.8)
    assert ProductTimes().of(5, 7) == 35


def test_every_ladder_begins_with_the_whole_and_ends_at_one() -> None:
    found = ladders([1536, 64, 1], 0.9)
    assert len({len(row) for row in found}) == 1
    for row, width in zip(found, (1536, 64, 1), strict=True):
        assert row[0] == width and row[-1] == 1 and row == sorted(row, reverse=True)
    assert all(later == round(0.9 * one) for one, later in itertools.pairwise(found[0]) if later > 1)
