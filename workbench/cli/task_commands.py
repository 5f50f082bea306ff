"""The commands about tasks: what there are, and what recipes get right of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import typer

from workbench.cli import inputs, terminal
from workbench.cli.options import (
    AsJson,
    CacheOptions,
    KVDtype,
    Methods,
    ModelOptions,
    Settings,
    TaskChat,
    TaskReply,
    bundled,
)

if TYPE_CHECKING:
    from workbench.runtime.comparison import Row


@bundled
def evaluate(
    methods: Methods = ["full"],  # noqa: B006  Typer takes the default from here and copies it
    task: Annotated[str, typer.Option("--task", help="a key from `workbench tasks`")] = "needle",
    length: Annotated[int | None, typer.Option("--length", help="tokens of its texts, where it makes them")] = None,
    task_settings: Annotated[
        list[str] | None,
        typer.Option("--task-set", metavar="NAME=VALUE", help="a task's parameter, as depth=0.1 or path=cases.jsonl"),
    ] = None,
    cases: Annotated[
        int | None, typer.Option("--cases", min=1, help="how many (default: all of a file, 4 of those that are made)")
    ] = None,
    budgets: Annotated[str, typer.Option("--budgets", help="separated by commas")] = "0.5,0.25",
    chat: TaskChat = None,
    max_new_tokens: TaskReply = None,
    kv_dtype: KVDtype = None,
    *,
    model: ModelOptions,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """What recipes get right of a task, beside what the uncompressed model gets right: one row a case and recipe."""
    chosen = inputs.task(task, length, task_settings or [])
    chosen.count(cases)  # a file that is missing is said before a model is loaded
    sizes = inputs.budgets(budgets)
    recipes = inputs.recipes(methods, settings or [])
    rows: list[Row] = []
    try:
        with terminal.working() as bar:
            session = model.session(bar, CacheOptions(kv_dtype=kv_dtype))
            evaluated = session.evaluate_rows(
                chosen,
                recipes,
                budgets=sizes,
                cases=cases,
                chat=chat,
                max_new_tokens=max_new_tokens,
                progress=bar.progress,
            )
            for row in evaluated:
                rows.append(row)  # noqa: PERF402  those before an interruption are shown
    finally:
        if rows:
            _evaluated(rows, as_json)


def _evaluated(rows: list[Row], as_json: bool) -> None:
    if as_json:
        terminal.document(rows)
        return
    columns = {
        "case": "case",
        "recipe": "recipe",
        "kv_mib": "cache MiB",
        "right": "right",
        "full_right": "full right",
        "score": "score",
        "kl": "KL",
        "perplexity": "perplexity",
        "expected": "expected",
        "text": "reply",
        "error": "error",
    }
    if any(row["expected"] is not None for row in rows):
        del columns["perplexity"]
    terminal.table(rows, {name: title for name, title in columns.items() if any(row[name] is not None for row in rows)})
    judged = [row for row in rows if row["right"] is not None]
    for recipe in dict.fromkeys(row["recipe"] for row in judged):
        mine = [row for row in judged if row["recipe"] == recipe]
        right, full = (sum(row[name] for row in mine) for name in ("right", "full_right"))
        print(f"{recipe}: {right} of {len(mine)} right; the uncompressed model: {full}")


def list_tasks(as_json: AsJson = False) -> None:
    """List the kinds of tasks with their parameters."""
    from workbench.tasks import KINDS, tasks

    rows = cast("list[Row]", tasks().to_dict("records"))
    if as_json:
        for row, kind in zip(rows, KINDS, strict=True):
            row["parameters"] = [asdict(parameter) for parameter in kind.parameters()]
        terminal.document(rows)
        return
    terminal.table(rows, {"key": "key", "summary": "what it is", "scorer": "right is", "parameters": "parameters"})
