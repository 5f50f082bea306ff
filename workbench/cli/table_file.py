"""Tables in files, by the file's ending."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

from workbench.errors import BadParameter, MissingExtra, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.runtime.comparison import Row

_ENDINGS = (".csv", ".json", ".parquet")


def check(path: Path) -> None:
    """Say now what would fail after the work: an unknown ending, a missing folder or library."""
    if path.suffix not in _ENDINGS:
        raise BadParameter(f"--out {path}: the ending says what to write, one of {', '.join(_ENDINGS)}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingExtra("Parquet needs pyarrow, which is not installed: pip install 'inference-workbench[sweep]'")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise BadParameter(f"--out {path}: cannot be written there; name a file in a folder that exists")


class Rows:
    """A table on its way into a file: rows of a CSV file are there as they come, the others' when the block ends.

    Where the file exists already, rows go beside it (`sweep.part.csv`) and take its place when all of them are there:
    an older table stays until a newer one is whole. The block may end early: `path` is where the rows so far are.
    """

    def __init__(self, path: Path) -> None:
        self._final = path
        self._rows: list[Row] = []
        self.path = path.with_name(f"{path.stem}.part{path.suffix}") if path.exists() else path

    def add(self, row: Row) -> None:
        """One more row, in the file at once where the format allows that."""
        self._rows.append(row)
        if self._final.suffix != ".csv":
            return
        first = len(self._rows) == 1
        try:
            with self.path.open("w" if first else "a", encoding="utf-8", newline="") as file:
                file.write(csv_lines([row], header=first))
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            write(_frame(self._rows), self._final)
            if self.path != self._final:
                self.path.unlink(missing_ok=True)
        elif self._rows and self._final.suffix != ".csv":
            write(_frame(self._rows), self.path)


def csv_lines(rows: Sequence[Row], *, header: bool) -> str:
    """Rows of a comparison as lines of CSV, below the names of their columns with `header`."""
    return str(_frame(rows).to_csv(index=False, header=header))


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    import pandas as pd

    from workbench.runtime.comparison import COLUMNS

    return pd.DataFrame(rows, columns=list(COLUMNS))


def write(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all."""
    try:
        handle, part = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")
        os.close(handle)
        try:
            if path.suffix == ".csv":
                frame.to_csv(part, index=False)
            elif path.suffix == ".json":
                from workbench.files.strict_json import dumps

                Path(part).write_text(dumps(frame.to_dict("records")) + "\n", encoding="utf-8")
            else:
                _one_type(frame).to_parquet(part, index=False)
            Path(part).replace(path)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> WorkbenchError:
    return WorkbenchError(f"cannot write {path}: {error.strerror or error}")


def _one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """Budgets are numbers or text; a Parquet column holds one type."""
    return frame.assign(budget=frame["budget"].map(str, na_action="ignore"))
