"""The command that searches for a recipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from workbench.cli import terminal
from workbench.cli.options import AsJson, CacheOptions, KVDtype, ModelOptions, TaskChat, TaskReply, bundled
from workbench.errors import BadParameter, Cancelled, WorkbenchError
from workbench.formatting import quoted

if TYPE_CHECKING:
    from workbench.runtime.comparison import Row
    from workbench.search import Found


@bundled
def run_search(
    methods: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]...", help="keys to choose from (default: all that take seconds)"),
    ] = None,
    limit: Annotated[str | None, typer.Option("--limit", help="the most memory, as 200MiB")] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option("--quality", metavar="NAME=VALUE", help="kl=0.02 (at most), correct=0.95, top1=0.9 (at least)"),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="what the limit counts: total, device, deployed, kv")
    ] = "total",
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help='"needle length=512"; may be given several times')
    ] = None,
    cases: Annotated[int, typer.Option("--cases", min=1, help="of each task")] = 4,
    trials: Annotated[int, typer.Option("--trials", min=1, help="recipes drawn at most")] = 100,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="how long at most")] = 9.0,
    patience: Annotated[float, typer.Option("--patience", min=0.1, help="seconds for a recipe on a case")] = 60.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="of all that is drawn")] = 0,
    results: Annotated[
        str | None, typer.Option("--results", help="a folder for what is measured; the same search goes on in it")
    ] = None,
    chat: TaskChat = None,
    max_new_tokens: TaskReply = None,
    kv_dtype: KVDtype = None,
    *,
    model: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Find the recipe that serves best within a limit of memory, or the smallest that is good enough."""
    from workbench.search import Goal, search
    from workbench.search.searching import TASKS
    from workbench.search.space import chosen_methods
    from workbench.sweep.grid import tasks_of

    bounds = dict(map(_bound, quality or []))
    Goal.of(limit, memory, bounds)  # what is wrong is said before a model is loaded
    chosen_methods(methods or None, host="counts")
    wanted = tasks_of(tasks or TASKS)
    try:
        with terminal.working() as bar:
            session = model.session(bar, CacheOptions(kv_dtype=kv_dtype))
            found = search(
                session,
                wanted,
                limit=limit,
                quality=bounds or None,
                memory=memory,
                methods=methods or None,
                cases=cases,
                trials=trials,
                minutes=minutes,
                patience=patience,
                seed=seed,
                results=results,
                chat=chat,
                max_new_tokens=max_new_tokens,
                progress=bar.progress,
            )
    except (Cancelled, KeyboardInterrupt) as stopped:
        kept = cast("Found | None", getattr(stopped, "finished", None))
        if kept is not None and kept.tried:
            _show(kept, as_json)
        raise Cancelled(
            "cancelled" if results is None else "cancelled: the same command goes on from there"
        ) from stopped
    _show(found, as_json)
    found.best()  # raises, in one line, where nothing serves


def _bound(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        hint = "is no number" if equals else "is not NAME=VALUE, as kl=0.02"
        raise BadParameter(f"--quality {quoted(text)} {hint}") from None


def _show(found: Found, as_json: bool) -> None:
    if as_json:
        terminal.document(found.numbers())
        return
    rows = cast("list[Row]", found.front().to_dict("records"))
    for row in rows:
        row["memory_mib"] = row["memory_nbytes"] / 2**20
        row["answers"] = f"{row['correct']} of {row['judged']}" if row["judged"] else None
    terminal.table(
        rows,
        {
            "memory_mib": f"{found.goal.memory} MiB",
            "answers": "right",
            "kl": "KL",
            "cases": "cases",
            "serves": "serves",
            "recipe": "recipe",
        },
    )
    print(f"{len(found.tried)} recipes tried; {found.ended}", file=sys.stderr)
    try:
        print(f"best: {found.best().label}")
    except WorkbenchError:
        return  # said at the end
