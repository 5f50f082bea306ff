"""Work off the event loop: a worker does one job at a time and keeps only the latest of those that wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from workbench.errors import WorkbenchError
from workbench.progress import Progress

T = TypeVar("T")
Post = Callable[[Callable[[], None]], None]

_EVERY_S = 0.1  # progress is shown this often
_APPLIED_S = 5.0  # how long a worker waits for a page that may be gone
_LOG = logging.getLogger(__name__)


@dataclass
class _Job:
    work: Callable[[Progress], Callable[[], None]]  # returns what shows its result on the page
    failed: Callable[[WorkbenchError], None]
    progress: Progress = field(default_factory=Progress)
    dropped: bool = False  # by a newer job: nobody waits for its outcome
    over: bool = False  # its outcome is on the page: what it reported on the way comes too late


class Worker:
    """One kind of work of one tab.

    `post` runs a function in the page's own thread; everything that touches the page goes through it. The next job
    begins only when the page has taken in the last result, so that nothing queues up. `on_progress(stage, done, total)`
    and `on_busy(bool)` are called in the page's thread.
    """

    def __init__(
        self,
        name: str,
        post: Post,
        on_busy: Callable[[bool], None] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._name = name
        self._post = post
        self._on_busy = on_busy
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._current: _Job | None = None
        self._next: _Job | None = None
        self._closed = False
        self._told = 0.0

    def submit(
        self,
        work: Callable[[Progress], T],
        done: Callable[[T], None],
        failed: Callable[[WorkbenchError], None],
        *,
        interrupt: bool = False,
    ) -> None:
        """Do `work(progress)` in a thread, then `done(result)` or `failed(error)` in the page's.

        It replaces whatever waits; with `interrupt` also what is being done, which is cancelled and forgotten.
        """

        def work_and_show(progress: Progress) -> Callable[[], None]:
            result = work(progress)
            return lambda: done(result)

        job = _Job(work_and_show, failed)
        job.progress = Progress(self._reporter(job))
        with self._lock:
            if self._closed:
                return
            self._next = job
            if self._current is not None:
                if interrupt:
                    self._current.dropped = True
                    self._current.progress.cancel()
                return
            self._current = job
            self._next = None
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def tell(self, show: Callable[[], None], *, always: bool = False) -> None:
        """From within `work`: show something on the page already; at most every tenth of a second unless `always`."""
        now = time.monotonic()
        job = self._current
        if job is None or job.dropped or self._closed or not (always or now - self._told >= _EVERY_S):
            return
        self._told = now
        self._post(lambda: None if job.dropped else show())

    def cancel(self) -> None:
        """Stop what is being done at its next step, and forget what waits."""
        with self._lock:
            self._next = None
            if self._current is not None:
                self._current.progress.cancel()

    def drop(self) -> None:
        """As `cancel`, but nobody is told: what was being done is not wanted any more."""
        with self._lock:
            self._drop_all()

    def close(self) -> None:
        """Cancel, and take nothing more: the tab is gone."""
        with self._lock:
            self._closed = True
            self._drop_all()

    def _drop_all(self) -> None:
        self._next = None
        if self._current is not None:
            self._current.dropped = True
            self._current.progress.cancel()

    @property
    def busy(self) -> bool:
        return self._current is not None

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for what is being done."""
        current = self._current
        return current is not None and not current.dropped

    def _work(self) -> None:
        on_busy = self._on_busy
        if on_busy is not None:
            self._post(lambda: on_busy(True))
        while (job := self._current) is not None:
            outcome = self._outcome(job)
            applied = threading.Event()
            if not (self._closed or job.dropped):
                self._post(partial(_apply, job, outcome, applied))
                applied.wait(_APPLIED_S)
            with self._lock:
                self._current, self._next = self._next, None
        if on_busy is not None and not self._closed:
            self._post(lambda: on_busy(self.busy))

    def _outcome(self, job: _Job) -> Callable[[], None]:
        """Do a job; what is returned tells the page of its result, or of what went wrong."""
        try:
            job.progress.check()
            show = job.work(job.progress)
            job.progress.check()
        except WorkbenchError as error:
            return partial(job.failed, error)
        except Exception as error:  # noqa: BLE001  (whatever it was, the page has to be told)
            _LOG.exception("%s failed", self._name)
            return partial(job.failed, WorkbenchError(f"{self._name} failed: {type(error).__name__}: {error}"))
        return show

    def _reporter(self, job: _Job) -> Callable[[str, int, int], None] | None:
        if self._on_progress is None:
            return None
        show, shown_stage, shown_at = self._on_progress, "", 0.0

        def report(stage: str, done: int, total: int) -> None:
            nonlocal shown_stage, shown_at
            now = time.monotonic()
            if stage != shown_stage or now - shown_at >= _EVERY_S:
                shown_stage, shown_at = stage, now
                self._post(lambda: None if job.dropped or job.over else show(stage, done, total))

        return report


def _apply(job: _Job, outcome: Callable[[], None], applied: threading.Event) -> None:
    job.over = True
    try:
        if not job.dropped:
            outcome()
    finally:
        applied.set()
