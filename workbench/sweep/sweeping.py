"""Sweeps: a grid of recipes on tasks into a folder of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.budget import BudgetLike
from workbench.errors import Cancelled, MissingExtra, WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Spec
from workbench.results import Results
from workbench.results.schema import Row
from workbench.sweep.grid import Grid, ModelSpec, Options, TaskLike, grid_of
from workbench.sweep.measuring import Workplace, computing_on, keys_of, measure
from workbench.sweep.tally import Tally, check_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ModelLike = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase | None]


def sweep(
    models: Sequence[ModelLike] | ModelLike,
    recipes: Sequence[Spec] | Spec,
    budgets: Sequence[BudgetLike] | BudgetLike = (0.5, 0.25),
    tasks: Sequence[TaskLike] | TaskLike = "needle",
    seeds: Iterable[int] = (0,),
    executor: Any = None,
    results: Results | str | Path = "results",
    *,
    cases: int | None = None,
    chat: bool | None = None,
    max_new_tokens: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    calibration: str | None = None,
    threads: int | None = None,
    keep_text: bool = True,
    study: str | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Measure every recipe at every budget on every case of every task with every model: one row each, into a folder.

    models: names, folders, hub ids, or (model, tokenizer) pairs. recipes: of any families; as text
    "snapkv window=16 + kivi". budgets: of KV methods; recipes that take none run once. tasks: keys, with parameters as
    "needle length=512", or as `wb.task` makes them. seeds: each draws one case of each task; tasks from files give all
    of their entries, or the first `cases`. executor: None computes here; a Dask client, or the address of a scheduler,
    computes on its workers, one model on each at a time. results: the folder.

    chat, max_new_tokens: as in `Session.evaluate`. device, dtype, kv_dtype: as in `Session`. calibration: what weight
    methods look at, as in `Session.calibrate`. threads: of the CPU in each process; the same number gives the same bits
    wherever it runs. keep_text: False stores hashes and token ids in place of texts. study: a name for these rows.

    Rows are stored as they are measured, so a sweep that was cancelled or killed, or whose disk was full, goes on where
    it was when it is called again. A prompt is read once for each model, weights and attention, and recipes are planned
    on that reading. A recipe that fails is a row whose `error` says why; it is measured again with `retry_failed`.

    Raises InputError for what is wrong with the grid, at once; WorkbenchError for a model that cannot be loaded, after
    the others, a full disk, or a lost cluster; Cancelled, with `finished` the results.
    """
    grid = grid_of(
        models,
        recipes,
        budgets,
        tasks,
        seeds,
        cases=cases,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        calibration=calibration,
        options=Options(chat, max_new_tokens, keep_text, study, threads),
    )
    into = results if isinstance(results, Results) else Results(results)
    known = into.keys("done") | (frozenset() if retry_failed else into.keys("failed"))
    progress = progress or Progress()
    try:
        if executor is None:
            in_process(grid, into, known, progress)
        else:
            _on_dask()(grid, into, known, progress, executor)
    except (Cancelled, KeyboardInterrupt) as stopped:
        stopped.finished = into  # type: ignore[union-attr]
        raise
    into.fold()
    return into


def _on_dask() -> Callable[[Grid, Results, frozenset[str], Progress, Any], None]:
    try:
        from workbench.sweep.on_dask import on_dask
    except ModuleNotFoundError as error:
        if error.name not in ("dask", "distributed"):
            raise
        raise MissingExtra(
            "sweeps on a cluster need Dask, which is not installed: pip install 'inference-workbench[cluster]'"
        ) from None
    return on_dask


def in_process(grid: Grid, into: Results, known: frozenset[str], progress: Progress) -> None:
    """Measure a grid here, model by model."""
    workplace, refused = Workplace(grid.options), dict[ModelSpec, WorkbenchError]()
    with computing_on(grid.options.threads):
        for index, model in enumerate(grid.models):
            try:
                bench = workplace.bench(model, progress)
            except Cancelled:
                raise
            except WorkbenchError as error:
                refused[model] = error
                continue
            keys = keys_of(bench, grid.items)
            missing = [item for item, key in zip(grid.items, keys, strict=True) if key not in known]
            tell = Tally(progress, grid.total - index * len(grid.items) - len(grid.items) + len(missing))
            measure(bench, missing, partial(_store, into, tell), progress.quiet())
    check_loaded(grid, refused)


def _store(into: Results, tally: Tally, row: Row) -> None:
    into.add(row)
    tally.tell()
