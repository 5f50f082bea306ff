"""Progress and cancellation: one small object handed down through long work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from workbench.errors import Cancelled

T = TypeVar("T")


class Progress:
    """What long work reports to, and how it is told to stop.

    `on_update(stage, done, total)` is called from the working thread; a terminal bar, a Panel indicator and an
    ipywidgets bar are each one such function. `cancel()` may be called from any thread: the work raises `Cancelled` at
    its next step and leaves nothing half done.
    """

    def __init__(self, on_update: Callable[[str, int, int], None] | None = None) -> None:
        self._on_update = on_update
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if someone asked to stop."""
        if self.cancelled:
            raise Cancelled("cancelled")

    def update(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `stage` are finished, and stop here if cancelled."""
        self.check()
        if self._on_update is not None:
            self._on_update(stage, done, total)

    def track(self, items: Iterable[T], stage: str, total: int) -> Iterator[T]:
        """Yield `items`, reporting each one after it has been worked on."""
        for done, item in enumerate(items):
            self.update(stage, done, total)
            yield item
        self.update(stage, total, total)

    def quiet(self) -> Progress:
        """What is cancelled with this one and reports nothing."""
        silent = Progress()
        silent._cancelled = self._cancelled
        return silent

    def part(self, index: int, parts: int, stage: str | None = None) -> Progress:
        """What reports to this one as one of several equal parts, and under another stage where one is given."""
        return Progress(lambda own, done, total: self.update(stage or own, index * total + done, parts * total))
