"""Checks of what a caller gives: the value in its plain Python type, or BadParameter in one line that names the
parameter, what was given, and what is accepted.

A number is a number: no text, no bool. NumPy's numbers count as Python's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from workbench.errors import BadParameter
from workbench.formatting import quoted

T = TypeVar("T")

MOST_TOKENS = 2**31 - 1  # that can be asked for


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not _within(int(value), low, high):
        raise _wrong(name, value, f"a whole number{_bounds(low, high)}")
    return int(value)


def number(name: str, value: Any, low: float | None = None, high: float | None = None, *, above: bool = False) -> float:
    """A finite number from `low` to `high`; above: more than `low`."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    try:
        found = float(value) if real else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not _within(found, low, high) or (above and found == low):
        raise _wrong(name, value, f"a finite number{_bounds(low, high, 'above' if above else 'of at least')}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # NumPy's own
        raise _wrong(name, value, "True or False")
    return bool(value)


def choice(name: str, value: T, choices: Iterable[T]) -> T:
    """One of the choices."""
    known = list(choices)
    if not any(type(value) is type(each) and value == each for each in known):
        raise _wrong(name, value, f"one of {', '.join(map(str, known))}")
    return value


def index(name: str, value: Any, count: int, of: str) -> int:
    """A number from 0 to `count` - 1; of: what there are so many of, as "the model's layers"."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < count:
        raise BadParameter(f"{name} {quoted(value)} does not exist: of {of} the first is 0 and the last is {count - 1}")
    return int(value)


def span(name: str, value: Any, most: int | None = None) -> tuple[int, int]:
    """A range of positions (from, to), half-open, of which there are `most`."""
    pair = list(value) if isinstance(value, tuple | list) and len(value) == 2 else []
    if not pair or not all(isinstance(end, Integral) and not isinstance(end, bool) for end in pair):
        raise _wrong(name, value, "two whole numbers (from, to)")
    begin, end = int(pair[0]), int(pair[1])
    if begin >= end:
        raise BadParameter(f"{name} is {quoted(value)}: the range of positions must not be empty")
    if begin < 0 or (most is not None and end > most):
        ends = "" if most is None else f" and {most:,} is where the prompt ends"
        raise BadParameter(f"{name} is {quoted(value)}: positions go from 0{ends}")
    return begin, end


def several(name: str, value: Any, of: str) -> list[Any]:
    """The values in a collection that is no text and no mapping; of: what it has, for the message."""
    try:
        if not isinstance(value, str | bytes | Mapping):
            return list(value)
    except TypeError:
        pass
    raise _wrong(name, value, f"a list of {of}")


def path(name: str, value: Any) -> Path:
    """A path that a file system can hold."""
    try:
        found = os.fspath(value)
    except TypeError:
        raise _wrong(name, value, "a path") from None
    if not isinstance(found, str) or not found or "\0" in found:
        raise _wrong(name, value, "a path without null characters")
    return Path(found)


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _bounds(low: float | None, high: float | None, least: str = "of at least") -> str:
    if low is not None and high is not None:
        return f" {least} {low} and at most {high}"
    if low is not None:
        return f" {least} {low}"
    return "" if high is None else f" of at most {high}"


def _wrong(name: str, value: Any, accepted: str) -> BadParameter:
    return BadParameter(f"{name} is {quoted(value)}: give {accepted}")
