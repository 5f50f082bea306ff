"""Rows on disk as they are measured, so that a run that is cut off loses nothing and another goes on from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Part:
    """One worker's file of rows, a line each; every row is on disk when `add` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{time.time_ns()}-{os.getpid()}.jsonl").open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_parts(folder: Path) -> list[Row]:
    """All rows of a folder, in the order they were begun; of two of the same case, recipe and budget the later one.

    A failure counts only where no attempt went well. The last line of a killed worker may be broken and is left out.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for row in _rows(sorted(folder.glob("*.jsonl"))):
        key = identity(row)
        if "error" not in row or "error" in found.get(key, row):
            found[key] = row
    return list(found.values())


def identity(row: Row) -> tuple[str, str, str]:
    """What a row is about."""
    return row["case"], row["recipe"], row["budget"]


def settled(rows: Iterable[Row]) -> set[tuple[str, str, str]]:
    """What need not be measured again: measured, or impossible at that budget; failures are tried again."""
    return {identity(row) for row in rows if "error" not in row}


def _rows(files: Iterable[Path]) -> Iterator[Row]:
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
