"""What a sweep measures: models by recipes at budgets by cases of tasks, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import arguments
from workbench.budget import BudgetLike
from workbench.errors import BadParameter, InputError
from workbench.formatting import quoted
from workbench.recipe import Recipe, Spec
from workbench.recipe_text import keyed
from workbench.runtime.comparison import Comparison
from workbench.tasks import Task, find

TaskLike = Task | str | Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it computes. source: a name, folder or hub id, or a (model, tokenizer or None) pair."""

    source: Any
    device: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    calibration: str | None = None

    @property
    def name(self) -> str:
        """As messages call it."""
        return str(self.source) if isinstance(self.source, str | Path) else type(self.source[0]).__name__


@dataclass(frozen=True)
class Item:
    """One row to be: a recipe, its budget included, on a case of a task."""

    recipe: Recipe
    task: Task
    number: int


@dataclass(frozen=True)
class Options:
    """What holds for all rows; as `Session.evaluate` and `sweep` take them. threads: of the CPU (None: torch's own)."""

    chat: bool | None = None
    max_new_tokens: int | None = None
    keep_text: bool = True
    study: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Grid:
    """Models, and what is measured on each: items in the order in which the least is read and compressed again."""

    models: tuple[ModelSpec, ...]
    items: tuple[Item, ...]
    options: Options

    @property
    def total(self) -> int:
        """How many rows there will be."""
        return len(self.models) * len(self.items)

    def units(self, items: Sequence[Item], parts: int) -> list[tuple[Item, ...]]:
        """Items in pieces that different workers may do without reading a prompt twice: all of a case in one piece.

        Without weight methods a piece is one case; with them there are as many as `parts`, for each makes the models
        under weights anew.
        """
        cases: dict[tuple[Task, int], list[Item]] = {}
        for item in items:
            cases.setdefault((item.task, item.number), []).append(item)
        groups = list(cases.values())
        if any(item.recipe.family("weights") for item in items):
            groups = [[item for each in groups[part::parts] for item in each] for part in range(parts)]
        return [ordered(group) for group in groups if group]


def grid_of(
    models: Any,
    recipes: Sequence[Spec] | Spec,
    budgets: Sequence[BudgetLike] | BudgetLike,
    tasks: Sequence[TaskLike] | TaskLike,
    seeds: Iterable[int],
    *,
    cases: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    calibration: str | None = None,
    options: Options | None = None,
) -> Grid:
    """The grid of a sweep. Raises what is wrong with any part of it, before a model is loaded."""
    options = options or Options()
    if options.chat is not None:
        arguments.flag("chat", options.chat)
    for name, value in (("max_new_tokens", options.max_new_tokens), ("threads", options.threads)):
        if value is not None:
            arguments.whole(name, value, 1, arguments.MOST_TOKENS)
    alone = isinstance(models, str | Path | tuple)
    sources = [models] if alone else arguments.several("models", models, "models")
    if not sources:
        raise BadParameter("no model is given: name at least one, for instance models=['smollm2-135m']")
    chosen = Comparison.of(recipes, budgets).cases
    each = [Recipe.of(recipe, budget=budget) for recipe, budget in chosen]
    numbered = [(task, number) for task in tasks_of(tasks) for number in _numbers(task, seeds, cases)]
    items = {Item(recipe, task, number): None for task, number in numbered for recipe in each}
    specs = [ModelSpec(source, device, dtype, kv_dtype, calibration) for source in dict.fromkeys(sources)]
    return Grid(tuple(specs), ordered(items), options)


def ordered(items: Iterable[Item]) -> tuple[Item, ...]:
    """Items so that those of the same weights, case and attention follow each other, otherwise as they came."""
    rows = list(items)
    places: dict[Any, int] = {}

    def place(key: Any) -> int:
        return places.setdefault(key, len(places))

    def order(item: Item) -> tuple[int, ...]:
        weights, attention = (item.recipe.family(name) for name in ("weights", "attention"))
        return (
            -1 if not weights else place(("weights", weights)),
            place((item.task, item.number)),
            -1 if not attention else place(("attention", attention)),
        )

    return tuple(sorted(rows, key=order))  # which keeps equals in their order


def tasks_of(tasks: Sequence[TaskLike] | TaskLike) -> list[Task]:
    """Tasks as they stand, by their keys with parameters ("needle length=512"), or as mappings with "task"."""
    alone = isinstance(tasks, Task | str | Mapping)
    given: list[Any] = [tasks] if alone else arguments.several("tasks", tasks, "tasks")
    if not given:
        raise BadParameter("no task is given: name at least one, for instance tasks=['needle']")
    return list(dict.fromkeys(map(_task, given)))


def _task(given: Any) -> Task:
    if isinstance(given, Task):
        return given
    if isinstance(given, str):
        key, values = keyed(given)
        return find(key)(**values)
    if isinstance(given, Mapping) and isinstance(given.get("task"), str):
        return find(given["task"])(**{name: value for name, value in given.items() if name != "task"})
    raise InputError(f"a task is its key, with parameters after it, or a mapping with 'task', not {quoted(given)}")


def _numbers(task: Task, seeds: Iterable[int], cases: int | None) -> Iterator[int]:
    """The cases of a task: one a seed where it draws them, all entries of a file, or the first `cases` of them."""
    if task.available is not None:
        yield from range(task.count(None if cases is None else min(cases, task.available)))
        return
    numbers = [arguments.whole("seeds", seed, 0, 2**63 - 1) for seed in arguments.several("seeds", seeds, "numbers")]
    if not numbers:
        raise BadParameter("no seed is given: each draws one case, as seeds=(0, 1, 2)")
    yield from dict.fromkeys(numbers)
