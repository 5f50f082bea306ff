"""One tab's work where a page does one thing at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import param

from workbench.errors import Cancelled, WorkbenchError
from workbench.progress import Progress
from workbench_widgets.app.work.worker import Post, Worker
from workbench_widgets.app.work.workspace import IDLE, Stage

T = TypeVar("T")


class Task(param.Parameterized):
    """What a page does, how far it is, and what went wrong. Parameters change in the page's thread only."""

    working = param.Boolean(False)
    stage: param.Parameter[Stage] = param.Parameter(IDLE)
    problem = param.String("")
    dark = param.Boolean(False)

    def __init__(self, post: Post) -> None:
        super().__init__()
        self._worker = Worker("work", post, self._busy, self._progress)

    def do(
        self,
        name: str,
        work: Callable[[Progress], T],
        done: Callable[[T], None],
        failed: Callable[[WorkbenchError], None] | None = None,
    ) -> None:
        """`work(progress)` in a thread, then `done(result)` here; whatever was going on is given up.

        failed: told besides of what went wrong, or of being cancelled.
        """
        self.param.update(problem="", stage=Stage(name))

        def fail(error: WorkbenchError) -> None:
            self.problem = f"Cancelled: {error}" if isinstance(error, Cancelled) else str(error)
            if failed is not None:
                failed(error)

        self._worker.submit(work, done, fail, interrupt=True)

    def tell(self, show: Callable[[], None]) -> None:
        """From within `work`: show something on the page already."""
        self._worker.tell(show)

    def cancel(self) -> None:
        """Stop what is going on at its next step."""
        self._worker.cancel()

    def close(self) -> None:
        """The tab is gone: its work stops."""
        self._worker.close()

    def _busy(self, busy: bool) -> None:
        self.param.update(working=busy, stage=self.stage if busy else IDLE)

    def _progress(self, stage: str, done: int, total: int) -> None:
        self.stage = Stage.of(stage, done, total)
