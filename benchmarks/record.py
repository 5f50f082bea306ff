"""Writing down a measurement: what ran where, when, with which versions, and the command that repeats it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "device": device,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python -m " + (sys.modules["__main__"].__spec__.name if sys.modules["__main__"].__spec__ else ""),
    }


def median_seconds(work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """The median time of `work()` in seconds."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return statistics.median(times)


def write(
    name: str,
    figures: dict[str, Any],
    table: Sequence[Sequence[str]],
    before: dict[str, Any],
    *more: Sequence[Sequence[str]],
) -> None:
    """Save results/NAME.json and results/NAME.md. table: its first row is the head; before: what `environment` said;
    more: further tables.
    """
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"environment": before, **figures}, indent=1) + "\n")
    tables = [line for each in (table, *more) for line in (markdown(each), "")]
    text = "\n".join([f"# {name}", "", *tables, where(before), ""])
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head."""
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def where(before: dict[str, Any]) -> str:
    """What `environment` said, as the last line of a report."""
    facts = ", ".join(f"{key} {value}" for key, value in before.items() if key not in ("command", "load_before"))
    return f"{facts}. Repeat: `{before['command']}`."
