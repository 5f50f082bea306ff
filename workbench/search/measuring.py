"""Measuring recipes for a search: on more and more cases, each row once, ordered so that little is made twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.errors import Cancelled, WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.search.goal import Goal, Measured

if TYPE_CHECKING:
    from workbench.registry import Method
    from workbench.results import Results
    from workbench.results.schema import Row
    from workbench.sweep.bench import Bench
    from workbench.tasks import Task


class TimeOver(Cancelled):
    """The time for a search is over."""


class TooSlow(WorkbenchError):
    """A recipe took longer on a case than a search waits."""


@dataclass
class Candidate:
    """A trial's recipe (None: its parameters do not go together), and the rows measured of it, case by case."""

    number: int
    recipe: Recipe | None
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.recipe is None or any(row["status"] != "done" for row in self.rows)

    def measured(self, goal: Goal, cases: int | None = None) -> Measured:
        """Over its first cases (default: all it was measured on)."""
        return Measured.of(self.rows[:cases], goal.memory)


class Patience(Progress):
    """Reports to another, and ends what takes too long.

    until: when a recipe's time on a case is over; end: when the search's is. Both by `time.monotonic`.
    """

    def __init__(self, progress: Progress, end: float) -> None:
        super().__init__(progress.update)
        self._progress, self._end = progress, end
        self._until = float("inf")
        self.lost = False  # whether it was lost in the last case

    def allow(self, seconds: float) -> None:
        """Let the next case take so long."""
        self._until, self.lost = time.monotonic() + seconds, False

    def check(self) -> None:
        self._progress.check()
        now = time.monotonic()
        if now > self._end:
            raise TimeOver("the time is over")
        if now > self._until:
            self._until, self.lost = float("inf"), True  # said once: what cleans up is not stopped too
            raise TooSlow("it took longer on a case than the search waits; its `patience` says how long that is")


@dataclass
class Measuring:
    """Rows of candidates on cases, kept in `results`.

    cases: in the order in which they are taken. patience: seconds that a recipe may take on a case. on_row: called
    after each row that was measured now.
    """

    bench: Bench
    results: Results
    cases: Sequence[tuple[Task, int]]
    patience: float
    progress: Patience
    on_row: Callable[[], None]

    def __post_init__(self) -> None:
        mine = "model_fingerprint = ?"
        self._known = {row["key"]: row for row in self.results.rows(mine, [self.bench.fingerprint])}

    def extend(self, candidates: Iterable[Candidate], count: int) -> None:
        """Measure candidates on their first `count` cases; one that fails is left there.

        Those of the same weights follow each other, as do those on the same case.
        """
        groups: dict[tuple[Method, ...], list[tuple[Candidate, Recipe]]] = {}
        for each in candidates:
            if each.recipe is not None and not each.failed and len(each.rows) < count:
                groups.setdefault(each.recipe.family("weights"), []).append((each, each.recipe))
        for weights, group in groups.items():
            if weights and any(self._missing(*pair, count) for pair in group):
                self._compress(weights)
            for place in range(count):
                for each, recipe in group:
                    if not each.failed and len(each.rows) == place:
                        each.rows.append(self._row(each.number, recipe, place))

    def _missing(self, each: Candidate, recipe: Recipe, count: int) -> bool:
        return any(self.bench.key(recipe, *case) not in self._known for case in self.cases[len(each.rows) : count])

    def _compress(self, weights: tuple[Method, ...]) -> None:
        """Make the model under weight methods beforehand, which may take longer than a case."""
        self.progress.allow(float("inf"))
        try:
            self.bench.session.readings.variants.get(weights, self.progress)
        except Cancelled:
            raise
        except WorkbenchError:
            return  # every row will say so

    def _row(self, trial: int, recipe: Recipe, place: int) -> Row:
        task, number = self.cases[place]
        key = self.bench.key(recipe, task, number)
        if key not in self._known:
            self.progress.check()
            self.progress.allow(self.patience)
            row = self.bench.row(recipe, task, number, self.progress)
            if not self.progress.lost:  # another day it may be quicker
                self.results.add({**row, "extra": {"trial": trial}})
            self._known[key] = row
            self.on_row()
        return self._known[key]
