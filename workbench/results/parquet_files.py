"""Rows in Parquet files: each written whole or not at all, never changed afterwards, and read whatever wrote it.

A file's name says the version of the schema that it was written in: `runs-v1-<time>-<random>.parquet`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from workbench.errors import InputError, MissingExtra, WorkbenchError
from workbench.results.schema import COLUMNS, VERSION, Row

if TYPE_CHECKING:
    import duckdb
    import pandas as pd

_NAME = re.compile(r"runs-v(\d+)-[0-9a-f]+-[0-9a-f]+\.parquet")
_ERRNO = re.compile(r'"errno":"(\d+)"')
_UNFINISHED = ".unfinished-"
_LEFT_S = 3600.0  # after which a file that nobody finished was left by a program that was killed

MIGRATIONS: Mapping[int, str] = MappingProxyType({VERSION: "*"})
"""What is selected from files of each version to have the columns of this one; columns that are missing are NULL."""

_DTYPES = MappingProxyType({"BIGINT": "Int64", "DOUBLE": "Float64", "BOOLEAN": "boolean"})


def connection() -> duckdb.DuckDBPyConnection:
    """A database in memory. Raises MissingExtra."""
    try:
        import duckdb
    except ImportError:
        raise MissingExtra(
            "results are kept with DuckDB, which is not installed: pip install 'inference-workbench[sweep]'"
        ) from None
    return duckdb.connect(":memory:", config={"threads": 2})


def listed(folder: Path) -> frozenset[str]:
    """The names of the files of rows in a folder. Raises InputError for those of a newer workbench."""
    try:
        names = {path.name: found for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))}
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror or error}") from error
    for name, found in names.items():
        if int(found[1]) not in MIGRATIONS:
            raise InputError(f"{folder / name} was written by a newer workbench: update this one to read it")
    return frozenset(names)


def create(database: duckdb.DuckDBPyConnection, table: str) -> None:
    """A table with the columns of rows."""
    columns = ", ".join(f"{name} {column.kind}" for name, column in COLUMNS.items())
    database.execute(f"CREATE TABLE {table} ({columns})")


def load(database: duckdb.DuckDBPyConnection, table: str, folder: Path, names: Iterable[str]) -> None:
    """Append the rows of files to a table. Raises FileNotFoundError where one is gone, WorkbenchError for a bad one."""
    import duckdb

    for version, selected in MIGRATIONS.items():
        paths = sorted(str(folder / name) for name in names if name.startswith(f"runs-v{version}-"))
        if not paths:
            continue
        try:
            database.execute(
                f"INSERT INTO {table} BY NAME SELECT {selected} FROM read_parquet(?, union_by_name = true)",  # noqa: S608  names of ours
                [paths],
            )
        except duckdb.Error as error:
            if any(not Path(path).exists() for path in paths):
                raise FileNotFoundError(str(folder)) from error
            raise WorkbenchError(f"cannot read the results in {folder}: {one_line(error)}") from error


def write(database: duckdb.DuckDBPyConnection, folder: Path, rows: Sequence[Row]) -> str:
    """Write checked rows into a new file of the folder; returns its name. Raises WorkbenchError, with nothing left."""
    values = ", ".join(f"CAST({name} AS {column.kind}) AS {name}" for name, column in COLUMNS.items())
    database.register("given", frame_of(rows))
    try:
        return _written(database, folder, f"SELECT {values} FROM given")  # noqa: S608  names of ours
    finally:
        database.unregister("given")


def fold(database: duckdb.DuckDBPyConnection, folder: Path, names: Iterable[str]) -> str | None:
    """Put the rows of several files into one, the newest of each key; None where a file is gone by now.

    The new file is there before the old ones go: a program that is killed in between leaves rows twice, which are read
    as one.
    """
    create(database, "folded")
    try:
        load(database, "folded", folder, names)
        made = _written(database, folder, f"SELECT * FROM folded {NEWEST}")  # noqa: S608  names of ours
    except FileNotFoundError:  # somebody else folds them
        return None
    finally:
        database.execute("DROP TABLE folded")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return made


NEWEST = "QUALIFY row_number() OVER (PARTITION BY key ORDER BY revision DESC, written DESC) = 1"
"""Of rows with the same key, the one that counts."""


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """Checked rows as a table whose columns have one type each."""
    import pandas as pd

    return pd.DataFrame(
        {
            name: pd.Series([row[name] for row in rows], dtype=_DTYPES.get(column.kind, "object"))
            for name, column in COLUMNS.items()
        }
    )


def sweep_up(folder: Path) -> None:
    """Take away what programs that were killed while writing have left."""
    with suppress(OSError):
        for path in folder.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink(missing_ok=True)


def one_line(error: Exception) -> str:
    """The first line of what a library says, which may go on for a page; of what a system refuses, its own words."""
    if refused := _ERRNO.search(str(error)):
        return os.strerror(int(refused[1]))
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _written(database: Any, folder: Path, query: str) -> str:
    import duckdb

    name = f"runs-v{VERSION}-{time.time_ns():016x}-{uuid4().hex[:12]}.parquet"
    part = folder / f"{_UNFINISHED}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        quoted = str(part).replace("'", "''")
        database.execute(f"COPY ({query}) TO '{quoted}' (FORMAT parquet, COMPRESSION zstd)")
        _settle(part)
        part.rename(folder / name)
        _settle(folder)
    except (OSError, duckdb.Error) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise WorkbenchError(
            f"cannot write results to {folder}: {why}; rows written before stay: make room, and run the same again"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return name


def _settle(path: Path) -> None:
    """Wait until what was written is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
