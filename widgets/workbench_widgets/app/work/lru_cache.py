"""A cache of what was computed lately, so that going back to it costs nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar, cast

T = TypeVar("T")


class LRUCache:
    """The results of the `size` computations that were used last, by key; any thread may ask."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, or what it gave last time. Others do not wait: two who ask at once both compute."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                return cast("T", self._results[key])  # a key stands for one kind of result
        result = compute()
        with self._lock:
            self._results[key] = result
            while len(self._results) > self._size:
                self._results.popitem(last=False)
        return result
