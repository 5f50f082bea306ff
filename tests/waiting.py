"""Waiting for what other threads, processes and browsers do."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any


def until(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Wait until `condition` gives something true, and give it back.

    Raises AssertionError after so many seconds; it says `what` was waited for, by default the condition's own code.
    """
    deadline = time.monotonic() + seconds
    while not (given := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"waited {seconds:g} s for {what or _code(condition)}, and it is still {given!r}")
        time.sleep(0.01)
    return given


def changed(read: Callable[[], Any], before: Any, seconds: float = 60) -> Any:
    """What `read` gives once it is no longer `before`."""
    (now,) = until(lambda: [now for now in [read()] if now != before], seconds, f"anything but {before!r}")
    return now


def _code(condition: Callable[[], Any]) -> str:
    try:
        return inspect.getsource(condition).strip()
    except (OSError, TypeError):  # a method of something built in
        return repr(condition)
