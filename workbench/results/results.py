"""The folder of results as users hold it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import arguments
from workbench.display import Shown
from workbench.errors import BadParameter, InputError
from workbench.files.folders import located
from workbench.formatting import quoted
from workbench.results import parquet_files
from workbench.results.front import SHOWN, check_figure, front_of, grouped
from workbench.results.old_files import rows_of
from workbench.results.schema import COLUMNS, Row, checked

if TYPE_CHECKING:
    import pandas as pd

_MANY = 64  # files of its own that a writer leaves before it puts them into one
_TRIES = 5  # while others fold the files that are being read


class Results(Shown):
    """Runs and what they were measured to be, in one folder that several programs may write and read at once.

    path: the folder; made with the first row. Rows lie in Parquet files that are written whole or not at all and never
    changed, so what any program wrote is there when that program, or this one, is killed. A row that is added again
    under its key replaces the earlier one. Columns: `workbench.results.COLUMNS`. Raises MissingExtra without DuckDB,
    InputError for a path that is no folder or holds results of a newer workbench.
    """

    def __init__(self, path: str | Path = "results") -> None:
        self.path = located(arguments.path("path", path))
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file: results lie in a folder")
        self._lock = threading.RLock()
        self._database = parquet_files.connection()
        parquet_files.create(self._database, "stored")
        parquet_files.create(self._database, "newest")
        self._database.execute("CREATE VIEW runs AS SELECT * FROM newest WHERE status <> 'deleted'")
        self._seen: frozenset[str] = frozenset()
        self._mine: list[str] = []
        self._refresh()

    # -- writing

    def add(self, rows: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Store rows; they are on the disk when this returns, all of them or none.

        Each needs `key` (`workbench.results.key_of`) and `status`; columns that are left out are NULL. One whose key
        is there already replaces that row. Raises BadParameter; WorkbenchError where the disk is full, and then the
        folder is as it was.
        """
        given = [rows] if isinstance(rows, Mapping) else list(rows)
        if not given:
            return
        with self._lock:
            self._refresh()
            known = self._revisions([str(row.get("key")) for row in given])
            now = datetime.now(UTC).replace(tzinfo=None)
            made: list[Row] = []
            for row in given:
                whole = checked({**row, "written": now, "revision": known.get(str(row.get("key")), -1) + 1})
                known[whole["key"]] = whole["revision"]
                made.append(whole)
            self._mine.append(parquet_files.write(self._database, self.path, made))
            if len(self._mine) >= _MANY:
                self.fold()

    def fold(self, *, everything: bool = False) -> None:
        """Put the files that this object wrote into one; everything: all files of the folder. Readers may go on."""
        with self._lock:
            names = sorted(parquet_files.listed(self.path)) if everything else list(self._mine)
            parquet_files.sweep_up(self.path)
            if len(names) > 1:
                made = parquet_files.fold(self._database, self.path, names)
                self._mine = [] if made is None else [made]

    def import_old(self, path: str | Path) -> int:
        """Take in a CSV of an old sweep, or a kv_quality.json; returns how many rows came. Again, it changes nothing.

        Raises InputError for a file that is neither.
        """
        rows = rows_of(arguments.path("path", path))
        known = self.keys("done") | self.keys("failed")
        fresh = {row["key"]: row for row in rows if row["key"] not in known}
        self.add(fresh.values())
        return len(fresh)

    def delete(self, keys: Iterable[str]) -> None:
        """Take rows away by their keys. A sweep would measure them again."""
        self._replace(
            keys, lambda row: {name: row[name] for name in ("key", "model", "recipe")} | {"status": "deleted"}
        )

    def note(self, key: str, text: str | None) -> None:
        """Write something about a row."""
        self._replace([key], lambda row: {**row, "note": text})

    def pin(self, key: str, pinned: bool = True) -> None:
        """Mark a row, or take the mark away."""
        self._replace([key], lambda row: {**row, "pinned": arguments.flag("pinned", pinned)})

    def _replace(self, keys: Iterable[str], change: Any) -> None:
        wanted = list(keys)
        with self._lock:
            rows = {row["key"]: row for row in self.rows("key IN (SELECT unnest(?))", [wanted])}
            if missing := next((key for key in wanted if key not in rows), None):
                raise BadParameter(f"there is no row with the key {missing!r} in {self.path}")
            self.add([change(rows[key]) for key in wanted])

    # -- reading

    def __len__(self) -> int:
        return int(self._ask("SELECT count(*) FROM runs")[0][0])

    def keys(self, status: str = "done") -> frozenset[str]:
        """The keys of the rows that are done, or failed."""
        return frozenset(key for (key,) in self._ask("SELECT key FROM runs WHERE status = ?", [status]))

    def rows(self, where: str = "true", values: Sequence[Any] = ()) -> list[Row]:
        """Rows as dictionaries, with None where there is nothing. where: a condition of SQL, with ? for values."""
        names = list(COLUMNS)
        found = self._ask(f"SELECT {', '.join(names)} FROM runs WHERE {where} ORDER BY started, key", values)  # noqa: S608
        return [dict(zip(names, row, strict=True)) for row in found]

    def frame(self, where: str = "true") -> pd.DataFrame:
        """All rows, or those that meet a condition of SQL, as they were begun: one row a recipe and case."""
        return self.sql(f"SELECT * FROM runs WHERE {where} ORDER BY started, key")  # noqa: S608  it is the user's own

    def sql(self, query: str) -> pd.DataFrame:
        """What a SELECT in DuckDB's SQL gives; the table is called `runs`. Raises BadParameter."""
        import duckdb

        with self._lock:
            self._refresh()
            try:
                statements = self._database.extract_statements(query)
                if [each.type for each in statements] != [duckdb.StatementType.SELECT]:
                    raise BadParameter(f"results answer one SELECT, not {quoted(query)}")
                return self._database.execute(statements[0]).df()
            except duckdb.Error as error:
                raise BadParameter(f"this query cannot be answered: {parquet_files.one_line(error)}") from error

    def recipes(self, *figures: str, where: str = "true") -> pd.DataFrame:
        """One row a model and recipe: the means of figures over the cases that were measured.

        Columns: model, recipe, budget, cases, all_cases (those measured of that model under any recipe), failed, the
        figures (default: bytes, correctness, KL, speed), recipe_json. where: a condition of SQL on the rows.
        """
        names = tuple(map(check_figure, figures)) or SHOWN
        return self.sql(grouped(names, f"SELECT * FROM runs WHERE {where}"))  # noqa: S608  it is the user's own

    def front(self, x: str, y: str, *, where: str = "true", complete: bool = True) -> pd.DataFrame:
        """The recipes that no other beats in the figures x and y together, one row each, the best in x first.

        Figures are means over cases, as in `recipes`. Less is better, but of what `HIGHER_IS_BETTER` names. complete:
        only recipes that were measured on every case that any recipe of their model was, for means over other cases do
        not compare. KL compares recipes of one model: with several, narrow it with `where`, as "model = 'a'".
        """
        table = self.recipes(*dict.fromkeys((check_figure(x), check_figure(y), *SHOWN)), where=where)
        if complete:
            table = table[(table["cases"] == table["all_cases"]) & (table["failed"] == 0)]
        return front_of(table, x, y)

    def to_csv(self, path: str | Path, where: str = "true") -> Path:
        """Write the rows into a CSV file, whole or not at all."""
        import os
        import tempfile

        to = arguments.path("path", path).expanduser()
        table = self.frame(where)
        try:
            handle, part = tempfile.mkstemp(dir=to.absolute().parent, prefix=f".{to.name}-")
            os.close(handle)
            try:
                table.to_csv(part, index=False)
                Path(part).replace(to)
            finally:
                Path(part).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {to}: {error.strerror or error}") from error
        return to

    # -- showing

    def __repr__(self) -> str:
        return f"<Results in {self.path}: {len(self):,} rows>"

    def summary(self) -> str:
        """How many rows there are of what, in words."""
        counts = self.numbers()
        lines = [f"Results in {self.path}: {counts['done']:,} runs, {counts['failed']:,} that failed"]
        lines += [f"  {name:8} {', '.join(counts[name]) or 'none'}" for name in ("models", "tasks", "recipes")]
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """The same, JSON-able."""
        done, failed, models, tasks, recipes = self._ask(
            "SELECT count(*) FILTER (status = 'done'), count(*) FILTER (status = 'failed'), "
            "list(DISTINCT model), list(DISTINCT task), list(DISTINCT recipe) FROM runs"
        )[0]
        named = {"models": models, "tasks": tasks, "recipes": recipes}
        return {"done": done, "failed": failed} | {
            name: sorted(filter(None, each or [])) for name, each in named.items()
        }

    # -- within

    def _ask(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        import duckdb

        with self._lock:
            self._refresh()
            try:
                return self._database.execute(query, list(values)).fetchall()
            except duckdb.Error as error:
                raise BadParameter(f"this query cannot be answered: {parquet_files.one_line(error)}") from error

    def _revisions(self, keys: list[str]) -> dict[str, int]:
        found = self._database.execute("SELECT key, revision FROM newest WHERE key IN (SELECT unnest(?))", [keys])
        return dict(found.fetchall())

    def _refresh(self) -> None:
        """Take in what was written since, by this program or another."""
        for attempt in range(_TRIES):
            names = parquet_files.listed(self.path)
            if names == self._seen:
                return
            try:
                gone = self._seen - names
                if gone:  # put into others: they are read anew
                    self._database.execute("DELETE FROM stored")
                    self._seen = frozenset()
                parquet_files.load(self._database, "stored", self.path, names - self._seen)
            except FileNotFoundError:
                self._seen = frozenset()
                self._database.execute("DELETE FROM stored")
                if attempt == _TRIES - 1:
                    raise
                continue
            self._seen = names
            self._database.execute("DELETE FROM newest")
            self._database.execute(f"INSERT INTO newest SELECT * FROM stored {parquet_files.NEWEST}")  # noqa: S608
            return
