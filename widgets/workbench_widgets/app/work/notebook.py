"""A page as a notebook that runs as it is: each prompt read once, each run made again, and a table of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.work.records import Record

_IMPORTS = """\
import pandas as pd

import workbench as wb
from workbench.examples import example
from workbench.recipe import Recipe

runs = {}"""
_TABLE = """\
pd.DataFrame(
    {
        number: {
            "recipe": run.recipe.label,
            "question": run.question,
            "cache, MiB": run.plan.nbytes / 2**20,
            "share": run.plan.share,
            "KL": run.quality.kl,
            "same top token": run.quality.top1_agreement,
            "answer": run.text,
        }
        for number, run in runs.items()
    }
).T"""


def notebook(records: Sequence[Record], default_model: str, fallback: str) -> str:
    """The notebook's JSON. fallback: Python for a page without runs. default_model: of pages that name none."""
    done: list[Record] = []
    for record in records:  # what went on from a run that was deleted cannot be made again
        there = record.row["turn"] == 1 or record.row["after"] in {other.number for other in done}
        if record.row["status"] == "done" and there:
            done.append(record)
    cells = [_markdown("# A page of the inference workbench\n\nEvery run of the page, made again.")]
    if not done:
        return _document([*cells, _code(fallback.strip())])
    cells.append(_code(_IMPORTS))
    for (model, prompt), group in groupby(done, lambda r: (r.row["model"], r.row["prompt_hash"])):
        members = list(group)
        cells.append(_markdown(f"## {_plain(members[0].row['prompt'])}, read by {_plain(model)}"))
        cells.append(_code(_reading(members[0].page, model or default_model)))
        cells += [_code(_run(record)) for record in members]
        del prompt
    return _document([*cells, _markdown("## All runs"), _code(_TABLE)])


def _reading(page: PageState, model: str) -> str:
    text = f"example({page.example!r}).text" if page.example else repr(page.text)
    return f"session = wb.Session({model!r})\nsession.read({text})"


def _run(record: Record) -> str:
    row = record.row
    question = row["question"].rpartition(" → ")[2] if row["turn"] > 1 else row["question"]
    arguments = f"max_new_tokens={record.page.tokens}"
    if row["turn"] > 1:
        made = f"runs[{row['after']}].ask({question!r}, {arguments})"
    else:
        asked = f"question={question!r}, " if question else ""
        made = f"session.run(Recipe.from_dict({row['recipe_json']!r}), {asked}{arguments})"
    note = "".join(f"# {line}\n" for line in str(row["note"] or "").splitlines())
    return f"{note}runs[{record.number}] = {made}\nruns[{record.number}]"


def _plain(text: str) -> str:
    """A text in Markdown that means nothing else there."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>()#+-.!|$~&" else sign for sign in " ".join(text.split()))


def _markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def _code(text: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": [], "execution_count": None}


def _document(cells: Sequence[dict[str, Any]]) -> str:
    document = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
