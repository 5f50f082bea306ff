"""A thread for what follows a moved slider: only the newest job counts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class LatestJob:
    """A thread that runs the newest job given to it; a job that waits when a newer one comes is never run."""

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._job: Callable[[], None] | None = None
        self._busy = self._closed = False
        threading.Thread(target=self._work, name="workbench-plan", daemon=True).start()

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` next, in place of any other that still waits. Returns at once; what `job` raises is logged."""
        with self._ready:
            self._job = job
            self._ready.notify_all()

    def wait(self, seconds: float = 60) -> bool:
        """Whether nothing is left to do, within so many seconds."""
        with self._ready:
            return self._ready.wait_for(lambda: self._job is None and not self._busy, seconds)

    def close(self) -> None:
        """End the thread after the job at hand."""
        with self._ready:
            self._job, self._closed = None, True
            self._ready.notify_all()

    def _work(self) -> None:
        while True:
            with self._ready:
                self._busy = False
                self._ready.notify_all()
                self._ready.wait_for(lambda: self._job is not None or self._closed)
                if self._closed:
                    return
                job, self._job, self._busy = self._job, None, True
            assert job is not None
            try:
                job()
            except Exception:  # noqa: BLE001  (the thread must live on: the next job may well succeed)
                _LOG.exception("a plan for the control panel failed")
