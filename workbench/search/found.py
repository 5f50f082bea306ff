"""What a search found: the recipes that it tried, their front, and the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench.errors import BudgetTooSmall, WorkbenchError
from workbench.formatting import mib
from workbench.recipe import Recipe
from workbench.results import Results
from workbench.search.goal import Goal, Measured
from workbench.search.standing import dominated

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("recipe", "memory_nbytes", "correct", "full_correct", "judged", "kl", "top1", "cases", "serves", "trial"),
    *("error", "recipe_json"),
)


class NothingServes(BudgetTooSmall):
    """No recipe that was measured keeps to a search's limit and bounds; the message names the nearest."""


@dataclass(frozen=True)
class Tried:
    """A recipe that a search tried, as the trial `number`, and what it measures."""

    number: int
    recipe: Recipe
    measured: Measured


class Found(Results):
    """The results of a search, and what it made of them.

    goal: what was searched for. tried: every recipe, in the order of trials. cases: how many the search has. ended:
    why it ended. Without a folder of its own the results lie in a temporary one, for as long as this object.
    """

    def __init__(
        self,
        path: str | Path | TemporaryDirectory[str],
        goal: Goal,
        cases: int,
        tried: Sequence[Tried] = (),
        ended: str = "",
    ) -> None:
        self._folder = path if isinstance(path, TemporaryDirectory) else None  # removed with this object
        super().__init__(path.name if isinstance(path, TemporaryDirectory) else path)
        self.goal = goal
        self.cases = cases
        self.tried = tuple(tried)
        self.ended = ended

    def ranking(self) -> pd.DataFrame:
        """All recipes that were tried, best first: those measured on more cases before others.

        Columns: recipe, memory_nbytes (of the case that takes most), correct and full_correct (right answers under the
        recipe, and of the uncompressed model) out of judged, kl, top1 (means over cases), cases, serves (whether it
        keeps to limit and bounds), trial, error, recipe_json.
        """
        return _table(sorted(self.tried, key=self._order), self.goal)

    def front(
        self, x: str | None = None, y: str | None = None, *, where: str = "true", complete: bool = True
    ) -> pd.DataFrame:
        """The recipes that no other beats in memory, right answers and KL together, smallest first; columns as in
        `ranking`. Only those measured on all cases, or on most where none is yet.

        x, y: another front, of figures of the stored rows, as `Results.front` makes it.
        """
        if x is not None and y is not None:
            return super().front(x, y, where=where, complete=complete)
        able = self.finished()
        behind = dominated([each.measured.figures for each in able])
        ahead = [each for each, beaten in zip(able, behind, strict=True) if not beaten]
        return _table(sorted(ahead, key=lambda each: each.measured.figures), self.goal)

    def best(self) -> Recipe:
        """The recipe that serves the goal best. Raises NothingServes, naming what is nearest to it."""
        able = sorted(self.finished(), key=self._order)
        if not able:
            why = next((each.measured.error for each in self.tried if each.measured.error), "nothing was measured")
            raise WorkbenchError(f"the search has no recipe yet: {why}")
        if self.goal.serves(able[0].measured):
            return able[0].recipe
        raise self._nothing(able)

    def finished(self) -> list[Tried]:
        """The recipes that were measured on as many cases as any, all but those that cannot be run."""
        able = [each for each in self.tried if each.measured.error is None and each.measured.cases]
        most = max((each.measured.cases for each in able), default=0)
        return [each for each in able if each.measured.cases == most]

    def _nothing(self, able: Sequence[Tried]) -> NothingServes:
        within = [each for each in able if not self.goal.excess(each.measured)]
        good = [each for each in able if not self.goal.shortfall(each.measured)]
        smallest = min(good or able, key=lambda each: each.measured.memory)
        said = f"none of the {len(self.tried)} recipes that were tried has {self.goal.words}"
        if self.goal.limit is not None and not within:
            said += f"; the smallest takes {mib(smallest.measured.memory)} ({smallest.recipe.label})"
        else:
            near = min(within, key=lambda each: self.goal.place(each.measured))
            said += f"; the nearest has {_figures(near.measured)} ({near.recipe.label})"
            if good:
                said += f", and the smallest of that quality takes {mib(smallest.measured.memory)}"
        return NothingServes(said, float(smallest.measured.memory))

    def _order(self, each: Tried) -> tuple[float, ...]:
        return (float(each.measured.error is not None), -float(each.measured.cases), *self.goal.place(each.measured))

    # -- showing

    def __repr__(self) -> str:
        return f"<Search for {self.goal.words}: {len(self.tried)} recipes tried, {len(self.finished())} on all cases>"

    def summary(self) -> str:
        """The goal, the best recipe and the front in words."""
        lines = [f"Search for {self.goal.words}: {len(self.tried)} recipes tried"]
        lines += [f"  ended  {self.ended}"] if self.ended else []
        try:
            best = self.best()
            measured = next(each.measured for each in self.finished() if each.recipe == best)
            lines.append(f"  best   {best.label}: {mib(measured.memory)}, {_figures(measured)}")
        except WorkbenchError as error:
            lines.append(f"  best   {error}")
        for row in self.front().head(10).to_dict("records"):
            answers = f"{row['correct']} of {row['judged']} right, " if row["judged"] else ""
            lines.append(f"  front  {mib(row['memory_nbytes'])}: {answers}KL {row['kl']:.3g}, {row['recipe']}")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """What was searched for and found, JSON-able."""
        try:
            best, why = self.best().to_dict(), None
        except WorkbenchError as error:
            best, why = None, str(error)
        front = [{**row, "recipe_json": json.loads(row["recipe_json"])} for row in self.front().to_dict("records")]
        return {
            "goal": self.goal.words,
            "limit": self.goal.limit,
            "memory": self.goal.memory,
            "quality": dict(self.goal.quality),
            "tried": len(self.tried),
            "cases": self.cases,
            "ended": self.ended,
            "best": best,
            "why_none": why,
            "front": front,
            "path": None if self._folder is not None else str(self.path),
        }


def _figures(measured: Measured) -> str:
    answers = f"{measured.correct} of {measured.judged} answers right, " if measured.judged else ""
    return f"{answers}KL {measured.kl:.3g}"


def _table(tried: Sequence[Tried], goal: Goal) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "recipe": each.recipe.label,
            "memory_nbytes": each.measured.memory,
            "correct": each.measured.correct,
            "full_correct": each.measured.full_correct,
            "judged": each.measured.judged,
            "kl": each.measured.kl,
            "top1": each.measured.top1,
            "cases": each.measured.cases,
            "serves": goal.serves(each.measured),
            "trial": each.number,
            "error": each.measured.error,
            "recipe_json": json.dumps(each.recipe.to_dict()),
        }
        for each in tried
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
