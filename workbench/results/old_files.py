"""Rows of files that earlier versions wrote: CSV tables of `workbench sweep`, and `kv_quality.json`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.files.paths import place, regular
from workbench.files.strict_json import loads
from workbench.formatting import quoted
from workbench.results.schema import Row, key_of

_LARGEST = 1 << 30  # bytes of a file
_MIB = 2**20


def rows_of(path: Path) -> list[Row]:
    """The rows of an old file, by its ending: .csv or .json. The same row always has the same key.

    Raises InputError for a file that cannot be read or is no such table.
    """
    try:
        text = regular(place(path), _LARGEST).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {quoted(str(path), 200)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    read = {".csv": _of_csv, ".json": _of_benchmark}.get(path.suffix)
    if read is None:
        raise InputError(f"{quoted(str(path), 200)}: what is imported is a .csv of an old sweep, or a kv_quality.json")
    try:
        return [{**row, "key": key_of({"imported": row}), "study": path.name} for row in read(text)]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{quoted(str(path), 200)} is no table of an earlier version: {error!r}") from error


def _of_csv(text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    needed = ("recipe", "budget", "kv_share", "kv_mib", "kl", "error")
    if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
        raise ValueError(f"it has no column {missing[0]}")
    for found in reader:
        row = {name: value or None for name, value in found.items()}
        names = (
            "kv_share",
            "score_share",
            "kl",
            "top1",
            "nll_difference",
            "perplexity",
            "first_token_s",
            "tokens_per_s",
        )
        divergence = _number(row, "first_divergence")
        yield {
            **_standing(row),
            **{name: row.get(name) for name in ("recipe", "budget", "attention", "text")},
            **{name: _number(row, name) for name in names},
            **{name: _bytes(row, mib) for name, mib in (("kv_nbytes", "kv_mib"), ("kv_host_nbytes", "host_mib"))},
            "weight_nbytes": _bytes(row, "weights_mib"),
            "first_divergence": None if divergence is None else int(divergence),
        }


def _of_benchmark(text: str) -> Iterator[Row]:
    table = loads(text)
    names: list[str] = table["columns"]
    for values in table["rows"]:
        row = dict(zip(names, values, strict=True))
        right = _number(row, "right")
        *_, number = str(row["case"]).rpartition("/")
        yield {
            **_standing(row),
            **{name: row[name] for name in ("model", "recipe", "device")},
            **{name: _number(row, name) for name in ("kl", "top1")},
            "budget": None if row["budget"] is None else str(row["budget"]),
            "task": f"{row['task']} length={row['length']} depth={row['depth']}",
            "task_json": {"benchmark": "kv_quality", "case": row["case"]},
            "case_number": int(number) if number.isdigit() else None,
            "kv_share": _number(row, "share"),
            "score": right,
            "correct": None if right is None else right == 1,
            "nll": _number(row, "nll"),
            "prompt_tokens": row["tokens"],
            "wall_s": _number(row, "seconds"),
            "extra": {name: row[name] for name in ("host", "gap") if row.get(name) is not None} or None,
        }


def _standing(row: Mapping[str, Any]) -> Row:
    error = row["error"]
    return {"status": "failed" if error else "done", "error": error or None}


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return None if value is None else float(value)


def _bytes(row: Mapping[str, Any], name: str) -> int | None:
    value = _number(row, name)
    return None if value is None else round(value * _MIB)
