"""Drawing: seeded by the trial's number, and levels of layers by EvoPress's mutation from the least sum of losses."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch

from workbench.core.knapsack import cheapest
from workbench.search.sampler import Levels, Sampler

LOSSES = torch.tensor([[9.0, 4, 0], [1, 0.5, 0], [6, 1, 0], [3, 2, 0]], dtype=torch.float64)
TRUE = LOSSES.flip(0)  # what layers lose together is not what they lose alone
SIZES = torch.tensor([[2, 4, 8]] * 4)
LIMIT = 18


def sampler(seed: int, limit: int = LIMIT) -> Sampler:
    return Sampler(seed, lambda: Levels(LOSSES, SIZES), lambda _: limit, startup=4)


def layered(trial: optuna.Trial) -> list[int]:
    return [trial.suggest_int(f"level {layer}", 0, 2) for layer in range(4)]


def run(seed: int, trials: int, made: optuna.Study | None = None) -> tuple[optuna.Study, list[list[int]]]:
    """A search for levels whose true losses add up to the least."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = made or optuna.create_study(directions=["minimize"] * 2)
    study.sampler = sampler(seed)
    found = []
    for _ in range(trials):
        trial = study.ask()
        levels = layered(trial)
        found.append(levels)
        loss = float(sum(TRUE[layer, level] for layer, level in enumerate(levels)))
        trial.set_constraint("limit", 0.0)
        trial.set_user_attr("place", [loss])
        study.tell(trial, [loss, trial.suggest_float("x", 0, 1)])
    return study, found


def test_levels_begin_with_the_least_sum_of_losses_and_keep_to_the_limit() -> None:
    _, found = run(0, 12)
    assert found[0] == cheapest(LOSSES, SIZES, LIMIT).tolist()
    sizes = [sum(int(SIZES[layer, level]) for layer, level in enumerate(levels)) for levels in found]
    assert max(sizes) <= LIMIT and len({tuple(levels) for levels in found}) > 3


def test_children_are_of_the_best_so_far() -> None:
    study, found = run(1, 30)
    losses = [trial.user_attrs["place"][0] for trial in study.trials]
    best = cheapest(TRUE, SIZES, LIMIT)
    assert found[0] != best.tolist() and best.tolist() in found
    assert min(losses) == float(TRUE[torch.arange(4), best].sum()) < losses[0]


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_search_that_was_stopped_draws_what_it_would_have_drawn(stop: int) -> None:
    whole, levels = run(3, 12)
    part, first = run(3, stop)
    rest, second = run(3, 12 - stop, part)
    assert first + second == levels
    assert [trial.params for trial in rest.trials] == [trial.params for trial in whole.trials]


def test_another_seed_draws_another_search() -> None:
    def drawn(seed: int) -> list[Any]:
        return [trial.params for trial in run(seed, 8)[0].trials]

    assert drawn(0) == drawn(0) != drawn(1)
