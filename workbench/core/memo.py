"""What was computed once, remembered for as long as its owner lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Memo:
    """Results by key. Who asks for the same waits; who asks for something else does not."""

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}
        self._lock = RLock()
        self._locks: dict[Hashable, RLock] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key`."""
        with self._lock:
            lock = self._locks.setdefault(key, RLock())
        with lock:
            if key not in self._results:
                self._results[key] = compute()
            return cast("T", self._results[key])
