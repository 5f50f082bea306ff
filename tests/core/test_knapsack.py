"""Levels within one total size: against all that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from workbench.core.knapsack import cheapest


@pytest.mark.parametrize("seed", range(6))
def test_no_other_levels_within_the_limit_cost_less(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = torch.rand(4, 3, generator=draw, dtype=torch.float64).cumsum(1).flip(1)
    sizes = torch.randint(1, 9, (4, 3), generator=draw).cumsum(1)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    index = torch.arange(4)
    totals = sizes[index, every].sum(1)
    for limit in range(int(sizes[:, 0].sum()), int(sizes[:, -1].sum()) + 1):
        found = cheapest(costs, sizes, limit)
        least = costs[index, every].sum(1)[totals <= limit].min()
        assert int(sizes[index, found].sum()) <= limit
        assert float(costs[index, found].sum()) == pytest.approx(float(least))


def test_where_nothing_fits_all_are_smallest() -> None:
    sizes = torch.tensor([[3, 5], [4, 6]])
    assert cheapest(torch.ones(2, 2), sizes, 5).tolist() == [0, 0]
