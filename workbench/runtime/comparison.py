"""Recipes at budgets side by side: one row a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from numbers import Real
from typing import TYPE_CHECKING, Any, ParamSpec

from workbench import arguments
from workbench.budget import Budget, BudgetLike
from workbench.errors import BadBudget, BadRecipe, Cancelled, WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe, Spec
from workbench.registry import Method

if TYPE_CHECKING:
    import pandas as pd

    from workbench.measure.quality import Quality
    from workbench.runtime.run import Run

P = ParamSpec("P")
Row = dict[str, Any]

COLUMNS = (
    *("recipe", "budget", "kv_share", "kv_mib", "host_mib", "attention", "score_share", "weights_mib"),
    *("kl", "top1", "nll_difference", "perplexity", "first_divergence", "first_token_s", "tokens_per_s"),
    *("text", "error"),
)


@dataclass(frozen=True)
class Comparison:
    """What is run for a comparison: recipes with the budget that each of them gets, or None for its own."""

    cases: tuple[tuple[Recipe, Budget | None], ...]

    @classmethod
    def of(cls, recipes: Sequence[Spec] | Spec, budgets: Sequence[BudgetLike] | BudgetLike) -> Comparison:
        """Every recipe at every budget, and once where it takes none. Raises BadRecipe, BadBudget, BadParameter."""
        alone = isinstance(recipes, str | Method | Recipe)
        specs: list[Any] = [recipes] if alone else arguments.several("recipes", recipes, "recipes")
        chosen = [Recipe.of(spec) for spec in specs]
        if not chosen:
            raise BadRecipe("no recipe is given: name at least one method, for instance 'full'")
        alone = isinstance(budgets, str | Real | Budget)
        values: list[Any] = [budgets] if alone else arguments.several("budgets", budgets, "budgets")
        sizes = [Budget.parse(value) for value in values]
        if not sizes and any(recipe.takes_budget() for recipe in chosen):
            raise BadBudget("no budget is given: give for instance budgets=[0.5, 0.25]")
        return cls(tuple((recipe, size) for recipe in chosen for size in (sizes if recipe.takes_budget() else [None])))

    def rows(self, run: Callable[[Recipe], Run], progress: Progress) -> Iterator[Row]:
        """One row a case, as soon as its run is measured; of a case that fails its `error` says why."""
        for done, (recipe, budget) in enumerate(self.cases):
            progress.update("comparing", done, len(self.cases))
            try:
                finished = run(Recipe.of(recipe, budget=budget))
                finished.measure(progress=progress)
                row = row_of(finished)
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  one recipe that fails must not take the others with it
                row = failed_row(recipe, budget, error)
            yield row
        progress.update("comparing", len(self.cases), len(self.cases))


def failed_row(recipe: Recipe, budget: Budget | None, error: Exception) -> Row:
    """A row with `COLUMNS` that says why there is no run of a recipe at a budget (None: at its own)."""
    try:
        label = Recipe.of(recipe, budget=budget).label
    except WorkbenchError:
        label = recipe.label
    return {**dict.fromkeys(COLUMNS), "recipe": label, "budget": _written(budget), "error": told(error)}


def told(error: Exception) -> str:
    """What went wrong, in one line."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, WorkbenchError) else f"unexpected {type(error).__name__}: {reason}"


def budget_of(recipe: Recipe) -> Budget | None:
    """The budget of a recipe: its own, or that of its only method."""
    if recipe.budget is None and len(recipe.methods) == 1:
        return recipe.methods[0].effective_budget
    return recipe.budget


def row_of(run: Run, quality: Quality | None = None) -> Row:
    """A run as one row of a table, with `COLUMNS`. quality: the figures to show (None: those of its answer)."""
    quality = quality or run.quality
    return {
        "recipe": run.recipe.label,
        "budget": _written(budget_of(run.recipe)),
        "kv_share": run.plan.share,
        "kv_mib": run.plan.nbytes / 2**20,
        "host_mib": run.plan.host_nbytes / 2**20,
        "attention": next((method.key for method in run.recipe.family("attention")), None),
        "score_share": run.plan.trace.score_share,
        "weights_mib": run.memory.samples[-1].categories["weights"] / 2**20,
        "kl": quality.kl,
        "top1": quality.top1_agreement,
        "nll_difference": quality.nll_difference,
        "perplexity": quality.perplexity,
        "first_divergence": quality.first_divergence,
        "first_token_s": run.timing.first_token_s,
        "tokens_per_s": run.timing.tokens_per_s,
        "text": run.text,
        "error": None,
    }


def table(rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """All rows as one table with these columns. What ends them early, Cancelled or Ctrl-C, carries those so far as
    `finished`.
    """
    import pandas as pd

    finished: list[Row] = []
    try:
        for row in rows:
            finished.append(row)  # noqa: PERF402  those before an interruption must be there
    except (Cancelled, KeyboardInterrupt) as stopped:
        stopped.finished = pd.DataFrame(finished, columns=list(columns))  # type: ignore[union-attr]
        stopped.add_note(f"{len(finished)} rows were finished before that: they are in this error's `finished`")
        raise
    return pd.DataFrame(finished, columns=list(columns))


def tabulated(
    rows: Callable[P, Iterator[Row]], columns: Sequence[str] = COLUMNS
) -> Callable[[Callable[..., object]], Callable[P, pd.DataFrame]]:
    """Decorator: a function that takes what `rows` takes and gives its rows as one table; its docstring is its own."""

    def decorate(described: Callable[..., object]) -> Callable[P, pd.DataFrame]:
        @wraps(described)
        def tabulate(*args: P.args, **kwargs: P.kwargs) -> pd.DataFrame:
            return table(rows(*args, **kwargs), columns)

        shown: Any = tabulate  # functions have a signature of their own where one is set
        shown.__signature__ = signature(rows).replace(return_annotation="pd.DataFrame")
        return tabulate

    return decorate


def _written(budget: Budget | None) -> float | str | None:
    return None if budget is None else budget.to_json()
