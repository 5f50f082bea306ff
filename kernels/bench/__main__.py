"""Measure on this machine's GPU: `python -m bench [NAME ...] [--seconds S] [--quick]`, from kernels/ of a checkout.

A NAME is a module of this folder with `rows(quick: bool)`, which returns or, better, yields one dictionary a case;
without names all of them run. After every row results/NAME.json and results/NAME.md are written anew, so that a run
that is cut off keeps what it measured. `python -m bench.table` renders them into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.measure import Ceilings, TimeUp, shares, time_limit
from bench.table import Row, markdown_of
from benchmarks.record import environment

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
OURS = {"__main__", "measure", "promises", "table"}


def names() -> list[str]:
    """The modules here that measure something."""
    return sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if module.name not in OURS)


def machine(arguments: list[str]) -> dict[str, Any]:
    """What the figures depend on: device, driver, versions, date, and the command that repeats them."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        **environment(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "command": " ".join(["python -m bench", *arguments]),
    }


def measure(
    name: str,
    produce: Callable[[], Iterable[Row]],
    where: dict[str, Any],
    ceilings: Ceilings,
    *,
    seconds: float | None = None,
    folder: Path = RESULTS,
) -> str | None:
    """Write down each row of `produce()` as it comes, for at most `seconds`. Returns why it ended early, or None."""
    rows: list[Row] = []
    stopped = None
    try:
        with time_limit(seconds):
            for row in produce():
                rows.append(shares(row, ceilings))
                print(one_line(rows[-1]), flush=True)
                save(name, rows, where, ceilings, folder=folder, stopped="still running")
    except TimeUp as over:
        stopped = str(over)
    except Exception as problem:  # noqa: BLE001  what was measured before is kept, whatever ends it
        traceback.print_exc()
        stopped = f"{type(problem).__name__}: {problem}"
    save(name, rows, where, ceilings, folder=folder, stopped=stopped)
    return stopped


def save(
    name: str, rows: list[Row], where: dict[str, Any], ceilings: Ceilings, *, folder: Path, stopped: str | None = None
) -> None:
    """Write NAME.json, and NAME.md for readers. Nothing is written while there are no rows: earlier results stay."""
    if not rows:
        return
    folder.mkdir(exist_ok=True)
    result = {"environment": where, "ceilings": ceilings.to_dict(), "stopped": stopped, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (folder / f"{name}.md").write_text(f"# {name}\n\n{markdown_of(result)}\n")


def one_line(row: Row) -> str:
    """The row for a log."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def main(arguments: list[str]) -> int:
    """Run; 1 if something failed, 2 if there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure kernels on this machine's GPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: all")
    parser.add_argument("--seconds", type=float, help="stop each module after this long and keep what it measured")
    parser.add_argument("--quick", action="store_true", help="few and small cases: does everything run?")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where to write them")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(names()))
    if unknown:
        parser.error(f"no such module: {', '.join(unknown)}; there are {', '.join(names())}")
    if not torch.cuda.is_available():
        print("python -m bench needs a CUDA device", file=sys.stderr)
        return 2
    where, ceilings = machine(arguments), Ceilings.measure()
    print(f"{where['device']}, {datetime.now(UTC):%H:%M:%S} UTC: {one_line(ceilings.to_dict())}", flush=True)
    failed = {}
    for name in given.names or names():
        torch.cuda.empty_cache()
        try:
            produce = import_module(f"bench.{name}").rows
        except Exception as problem:  # noqa: BLE001  the other modules go on
            failed[name] = f"{type(problem).__name__}: {problem}"
            continue
        stopped = measure(
            name, partial(produce, given.quick), where, ceilings, seconds=given.seconds, folder=given.results
        )
        if stopped:
            failed[name] = stopped
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
