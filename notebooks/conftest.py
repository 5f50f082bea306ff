"""How nbval compares outputs here: words, counts and bytes must agree exactly, measured figures within 5 %.

A whole number is a count, and a number before a unit of bytes is a size: exact. One with a decimal point or an exponent
was measured: sums come out a little differently on other processors and other builds of torch, and a rounded figure may
then end in the next digit. What views and panels show is compared through their numbers, Plotly figures through their
data. Still pictures and summaries as HTML show the same again, with wall times in them: they are not compared.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

import numpy as np
import pytest

_NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)((?: ?(?:bytes|[KMGT]i?B))?\b)")
_RELATIVE, _ABSOLUTE = 0.05, 1e-3  # the latter for differences of two figures that are nearly equal
_COUNT = re.compile(r"[-+]?[\d,]+")
_SUMMARY = '<div class="workbench-summary">'


class Tolerant(str):
    """A text that equals another one whose words, counts and sizes are the same and whose other numbers are close."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        return _words(self) == _words(other) and all(
            _close(*pair) for pair in zip(_NUMBER.findall(self), _NUMBER.findall(other), strict=True)
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class TolerantJSON(str):
    """JSON that equals other JSON of the same form, whose texts and whole numbers are the same, whose others close."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        return same(json.loads(self), json.loads(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def held(value: Any, sanitize: Any = str) -> Any:
    """An output's value as it is compared: the text of one as `Tolerant`, a figure or other JSON as `TolerantJSON`."""
    if isinstance(value, dict | list):
        return TolerantJSON(json.dumps(value, sort_keys=True))
    if isinstance(value, str):
        return "" if value.startswith(_SUMMARY) else Tolerant(sanitize(value))
    return value


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values show the same; arrays that Plotly packs count as the numbers in them."""
    one, other = _unpacked(one), _unpacked(other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return _same_arrays(np.asarray(one), np.asarray(other))
    if isinstance(one, float) and isinstance(other, float | int) and not isinstance(other, bool):
        return math.isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) or (math.isnan(one) and math.isnan(other))
    if type(one) is not type(other):
        return isinstance(other, float) and same(other, one)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, str):
        return Tolerant(one) == other
    return bool(one == other)


def _unpacked(value: Any) -> Any:
    """The array of numbers that Plotly writes as base64; anything else as it is."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
        return array.reshape([int(size) for size in str(value.get("shape", array.size)).split(",")])
    return value


def _same_arrays(one: Any, other: Any) -> bool:
    if one.shape != other.shape or "O" in (one.dtype.kind, other.dtype.kind):
        return False
    if one.dtype.kind in "iu" and other.dtype.kind in "iu":
        return bool((one == other).all())
    return bool(np.isclose(one, other, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True).all())


def _words(text: str) -> list[str]:
    return _NUMBER.sub(r"#\2", text).replace("-", " ").split()  # rules of tables are as wide as their numbers


def _close(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two numbers, each with its unit or "", stand for the same figure."""
    if one[1] != other[1]:
        return False
    a, b = (float(number.replace(",", "")) for number, _ in (one, other))
    if one[1] or (_COUNT.fullmatch(one[0]) and _COUNT.fullmatch(other[0])):
        return a == b
    last_digit = max(_last_digit(one[0]), _last_digit(other[0]))
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=max(1.01 * last_digit, _ABSOLUTE))


def _last_digit(number: str) -> float:
    """What one in the last digit of a printed number stands for."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "sanitize"):
            item.sanitize = _tolerant(item.sanitize)  # type: ignore[attr-defined]


def _tolerant(sanitize: Any) -> Any:
    return lambda value: held(value, sanitize)
