"""How a search draws: Optuna's TPE for what is chosen and set, EvoPress's operators for the levels of layers.

Each trial is drawn with a generator of its own, seeded by the search's seed and the trial's number: what is drawn
depends on the trials before it and on nothing else, so a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from optuna.samplers import BaseSampler, TPESampler
from torch import Tensor

from workbench.core.evolution import switched, total
from workbench.core.knapsack import cheapest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

LEVEL = "level "  # the parameters that are levels of layers begin so
_PLACE = "place"  # the attribute of a trial that says how good it is


@dataclass(frozen=True)
class Levels:
    """What is known of layers at levels. losses: float64 [l, v], of each alone. sizes: int64 [l, v], ascending."""

    losses: Tensor
    sizes: Tensor

    def begin(self, limit: int) -> Tensor:
        """The levels int64 [l] within a limit whose losses add up to the least."""
        return cheapest(self.losses, self.sizes, limit)

    def child(self, parent: Tensor, limit: int, draw: torch.Generator) -> Tensor:
        """A parent's levels [l] with some raised and others lowered, within a limit (EvoPress's mutation)."""
        return switched(parent, self.sizes, limit, draw)


class Sampler(BaseSampler):
    """Draws trials of several objectives and constraints.

    levels: gives what is known of layers when the first trial by layer is drawn. limit: bytes that a trial with these
    parameters has for its cache. startup: trials before which everything is drawn at random.
    """

    def __init__(
        self, seed: int, levels: Callable[[], Levels], limit: Callable[[dict[str, Any]], int], startup: int = 16
    ) -> None:
        self._seed, self._levels, self._limit, self._startup = seed, levels, limit, startup
        self._drawn: tuple[int, Tensor] | None = None  # the trial whose levels were drawn last

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name.startswith(LEVEL):
            if self._drawn is None or self._drawn[0] != trial.number:
                self._drawn = trial.number, self._level(study, trial)
            return int(self._drawn[1][int(param_name.removeprefix(LEVEL))])
        return self._of_trial(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of_trial(trial.number, "").after_trial(study, trial, state, values)

    def _of_trial(self, number: int, name: str) -> TPESampler:
        return TPESampler(seed=zlib.crc32(f"{self._seed}/{number}/{name}".encode()), n_startup_trials=self._startup)

    def _level(self, study: Study, trial: FrozenTrial) -> Tensor:
        """The levels [l] of a trial: those with the least sum of losses first, then children of the best so far."""
        known, limit = self._levels(), self._limit(trial.params)
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{trial.number}/levels".encode()))
        tried = {tuple(found.tolist()): each for each in _finished(study) if (found := _levels_of(each)) is not None}
        begin = known.begin(limit)
        if tuple(begin.tolist()) not in tried:
            return begin
        fitting = [each for levels, each in tried.items() if total(torch.tensor(levels), known.sizes) <= limit]
        best = min(fitting, key=lambda each: tuple(each.user_attrs[_PLACE]), default=None)
        found = None if best is None else _levels_of(best)
        return known.child(begin if found is None else found, limit, draw)


def _finished(study: Study) -> list[FrozenTrial]:
    return [each for each in study.get_trials(deepcopy=False) if _PLACE in each.user_attrs]


def _levels_of(trial: FrozenTrial) -> Tensor | None:
    """The levels of a trial's layers; None where it has none."""
    named = sorted((int(name.removeprefix(LEVEL)), value) for name, value in trial.params.items() if LEVEL in name)
    return torch.tensor([value for _, value in named]) if named else None
