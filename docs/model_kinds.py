"""The page of all kinds of models, written from benchmarks/results/model_kinds.json: exact, exact but for these layers,
or refused.

`site_hook.py` calls `page()` whenever the site is built, so it is not kept in the repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "model_kinds.json"
_TITLE = "Which models are exact"
_ABOUT = (
    "Every kind of causal language model that transformers knows, built small with random weights. What is read and "
    "decoded with it is held against transformers' own `generate`: it is exact, or refused in one line. "
    "`workbench models audit` tells the same of one model, layer by layer."
)
Row = Mapping[str, Any]


def page(path: Path = RESULTS) -> str:
    """The page in Markdown: one row for each kind, in the part of what became of it."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows: list[Row] = found["kinds"]
    exact = [row for row in rows if row["result"] == "exact"]
    parts = [
        (
            "Exact in every layer",
            "what else was tried, where it does not run",
            [r for r in exact if not left(r)],
            looks,
        ),
        (
            "Exact, with layers left as they are",
            "layers that KV methods leave, and why",
            [r for r in exact if left(r)],
            left,
        ),
        ("Refused", "why", [r for r in rows if r["result"] == "refused"], why),
        ("Not tried", "why", [r for r in rows if r["result"] not in ("exact", "refused")], why),
    ]
    where = found["environment"]
    lines = ["---", "hide: [toc]", "---", "", f"# {_TITLE}", "", _ABOUT, ""]
    for heading, says, some, told in parts:
        lines += [f"## {heading}: {len(some)} kinds", "", f"| kind | config | {says} |", "| --- | --- | --- |"]
        lines += [f"| {row['kind']} | {config(row)} | {cell(told(row))} |" for row in some]
        lines.append("")
    lines.append(
        f"transformers {where['transformers']}, torch {where['torch']}, {where['date']}. Repeat: `{where['command']}`."
    )
    return "\n".join(lines) + "\n"


def config(row: Row) -> str:
    """The class of the kind's config, and whose model it is where that is another kind's."""
    named = f"`{row['config']}`" if "config" in row else ""
    other = row.get("same_as")
    return f"{named} (the same model as {other})" if other else named


def left(row: Row) -> str:
    """Layers that stay exact, with the reason, then what does not run for it."""
    layers = "; ".join(f"{which}: {reason}" for reason, which in row.get("left", {}).items())
    return "; ".join(filter(None, (layers, looks(row)))) if layers else ""


def looks(row: Row) -> str:
    """What of methods and looks does not run on it."""
    return "; ".join(f"{name}: {said}" for name, said in row["looks"].items() if said != "works")


def why(row: Row) -> str:
    """Why it is refused or was not tried."""
    said: str = row["why"]
    return f"{row['result']}: {said}" if row["result"] in ("broken", "unbuilt") else said


def cell(text: str) -> str:
    """Text as a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")
