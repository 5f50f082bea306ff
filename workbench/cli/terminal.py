"""What goes to the terminal: documents and tables on stdout, progress on stderr. Rich is imported when needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from workbench.files.strict_json import dumps
from workbench.progress import Progress

_WIDTH = 160  # of tables that go into a pipe or a file, where there is no terminal to ask


def document(value: Any) -> None:
    """One JSON document."""
    print(dumps(value))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """A table with one line or more a row; columns: field -> heading."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Brackets in an answer are no markup.
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else _WIDTH)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for field, heading in columns.items():
        numeric = all(isinstance(row.get(field), int | float | None) for row in rows)
        grid.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(_cell(row.get(field)) for field in columns))
    with console.capture() as drawn:  # printed by us: Rich would end the program when a pipe closes
        console.print(grid)
    print("\n".join(line.rstrip() for line in drawn.get().strip("\n").splitlines()))


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):  # a figure that is missing, or is none
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split())


class Bar:
    """The progress of long work on stderr, while that is a terminal; `stop` when something else is to be written."""

    def __init__(self) -> None:
        self.progress = Progress(self._update)
        self._bar: Any = None
        self._task: Any = None
        self._stage = ""
        self._stopped = not sys.stderr.isatty()

    def _update(self, stage: str, done: int, total: int) -> None:
        if self._stopped:
            return
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(stage, total=total)
        if stage != self._stage:
            self._stage = stage
            self._bar.reset(self._task, description=stage, total=total)
        self._bar.update(self._task, completed=done, total=total or None)

    def stop(self) -> None:
        """Take the bar away for good."""
        self._stopped = True
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def working() -> Iterator[Bar]:
    """A bar for the work inside the block; it is gone afterwards, whatever happens."""
    bar = Bar()
    try:
        yield bar
    finally:
        bar.stop()
