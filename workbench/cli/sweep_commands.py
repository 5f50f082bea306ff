"""The commands about many runs: measure a grid into a folder of results, and look into such a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from workbench.cli import inputs, terminal
from workbench.cli.options import AsJson, Calibration, KVDtype, Settings, TaskChat, TaskReply
from workbench.errors import BadParameter, Cancelled, MissingExtra
from workbench.formatting import quoted

if TYPE_CHECKING:
    import pandas as pd

    from workbench.results import Results
    from workbench.runtime.comparison import Row

_FILES = (".yaml", ".yml")


def run_sweep(
    what: Annotated[
        list[str],
        typer.Argument(metavar="FILE.yaml | RECIPE...", help='a description, or recipes: "snapkv window=16 + kivi"'),
    ],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="may be given several times (default: smollm2-135m)")
    ] = None,
    budgets: Annotated[str | None, typer.Option("--budgets", help="separated by commas (default: 0.5,0.25)")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help='"needle length=512"; may be given several times')
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="each draws a case of each task: 0,1,2 or 0-7 (default: 0)")
    ] = None,
    cases: Annotated[
        int | None, typer.Option("--cases", min=1, help="how many of a task's file (default: all)")
    ] = None,
    results: Annotated[str | None, typer.Option("--results", help="the folder (default: results)")] = None,
    executor: Annotated[
        str | None, typer.Option("--executor", help="the address of a Dask scheduler, as tcp://host:8786")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="so many processes of this machine compute, with Dask")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="of the CPU, in each process")] = None,
    chat: TaskChat = None,
    max_new_tokens: TaskReply = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="what models compute in")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1")] = None,
    kv_dtype: KVDtype = None,
    calibration: Calibration = None,
    study: Annotated[str | None, typer.Option("--study", help="a name for these rows")] = None,
    keep_text: Annotated[
        bool | None, typer.Option("--keep-text/--no-text", help="store texts, or hashes and token ids alone")
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="measure again what failed before")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure recipes at budgets on cases of tasks, with models; every row goes into a folder as soon as it is there.

    The same command goes on where it was stopped. FILE.yaml holds the same names; options given beside it win.
    """
    from workbench.sweep import sweep
    from workbench.sweep.description import described

    options: dict[str, Any] = {
        "models": models,
        "budgets": None if budgets is None else inputs.budgets(budgets),
        "tasks": tasks,
        "seeds": seeds,
        "cases": cases,
        "results": results,
        "executor": executor,
        "workers": workers,
        "threads": threads,
        "chat": chat,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "device": device,
        "kv_dtype": kv_dtype,
        "calibration": calibration,
        "study": study,
        "keep_text": keep_text,
        "retry_failed": retry_failed,
    }
    given, where = _described(what, settings or [])
    description = described(given | {name: value for name, value in options.items() if value is not None}, where)
    arguments = description.arguments()
    try:
        with terminal.working() as bar, _computing(description.executor, description.workers) as place:
            done = sweep(**arguments, executor=place, progress=bar.progress)
    except (Cancelled, KeyboardInterrupt) as stopped:
        kept = getattr(stopped, "finished", None)
        rows = "" if kept is None else f"; {len(kept):,} rows are in {kept.path}: the same command goes on from there"
        raise Cancelled(f"cancelled{rows}") from stopped
    _show(done, as_json)


def _described(what: list[str], settings: list[str]) -> tuple[dict[str, Any], str]:
    """What is described by a file, or by the recipes that were typed, and what messages call it."""
    from workbench.sweep.description import read

    files = [name for name in what if name.endswith(_FILES)]
    if not files:
        return {"recipes": [recipe.to_dict() for recipe in inputs.recipes(what, settings)]}, "sweep"
    if len(what) > 1 or settings:
        raise BadParameter(f"{quoted(files[0])} describes the sweep: give it alone, without recipes and --set")
    return read(files[0]), files[0]


@contextmanager
def _computing(executor: str | None, workers: int | None) -> Iterator[Any]:
    """Where it is computed: here, on a cluster by its address, or on so many processes of this machine."""
    if workers is None:
        yield executor
        return
    if executor is not None:
        raise BadParameter("--executor and --workers: give the one or the other")
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise MissingExtra(
            "--workers needs Dask, which is not installed: pip install 'inference-workbench[cluster]'"
        ) from None
    quiet = logging.CRITICAL  # what matters of its workers comes back as rows, or as one line
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=quiet) as cluster,
        Client(cluster) as client,
    ):
        yield client


def show_results(
    folder: Annotated[str, typer.Argument(help="of results")] = "results",
    where: Annotated[
        str, typer.Option("--where", help="a condition of SQL on the rows, as \"task = 'needle'\"")
    ] = "true",
    front: Annotated[
        str | None,
        typer.Option("--front", help="two figures, as deployed_nbytes,kl: what no other recipe beats in both"),
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="every row, not the means of each recipe")] = False,
    sql: Annotated[str | None, typer.Option("--sql", help="a query of DuckDB's SQL; the table is called runs")] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="write the rows into this file")] = None,
    old: Annotated[
        str | None, typer.Option("--import", help="take in a CSV of an old sweep, or a kv_quality.json")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="put many small files into one")] = False,
    as_json: AsJson = False,
) -> None:
    """Look into a folder of results: the means of each recipe, the front, every row, or a query."""
    from workbench.results import Results

    if old is None and not Path(folder).expanduser().is_dir():
        raise BadParameter(f"there is no folder {quoted(folder, 200)}: `workbench sweep` makes one")
    found = Results(folder)
    if old is not None:
        print(f"{found.import_old(old):,} rows taken in")
    if fold:
        found.fold(everything=True)
    if csv is not None:
        print(f"{len(found.frame(where)):,} rows written to {found.to_csv(csv, where)}")
    if sql is not None:
        _print(found.sql(sql), as_json)
    elif front is not None:
        x, comma, y = (part.strip() for part in front.partition(","))
        if not comma:
            raise BadParameter(f"--front {quoted(front)}: name two figures, as deployed_nbytes,kl")
        _print(found.front(x, y, where=where), as_json)
    elif rows:
        _print(found.frame(where), as_json)
    elif old is None and csv is None:
        _show(found, as_json, where)


def _show(found: Results, as_json: bool, where: str = "true") -> None:
    """What there is in short, and the means of each recipe."""
    table = found.recipes(where=where)
    if as_json:
        terminal.document({"path": str(found.path), **found.numbers(), "means": _records(table)})
        return
    print(found.summary())
    _print(table.drop(columns=["recipe_json", "budget"]), as_json)


def _print(table: pd.DataFrame, as_json: bool) -> None:
    rows = _records(table)
    if as_json:
        terminal.document(rows)
        return
    hidden = {name for name in table.columns if name.endswith("_json")}
    shown = {name: name for name in table.columns if name not in hidden and table[name].notna().any()}
    terminal.table(rows, shown)


def _records(table: pd.DataFrame) -> list[Row]:
    return cast("list[Row]", table.astype(object).where(table.notna(), None).to_dict("records"))
