"""How nbval compares outputs here: words and counts must agree exactly, measured figures within a share of themselves.

A whole number is a count. One with a decimal point, an exponent or a percent sign was measured: sums come out a little
differently on other processors and other builds of torch, and a rounded figure may then end in another digit. Plotly
figures are pictures of numbers that stand in the text beside them: they are not compared.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

_NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?)(%?)")
_RELATIVE, _ABSOLUTE = 0.1, 1e-3  # the latter for differences of two figures that are nearly equal
_COUNT = re.compile(r"[-+]?[\d,]+")
_PICTURES = ("application/vnd.plotly.v1+json",)


class Tolerant(str):
    """A text that equals another one whose words and counts are the same and whose other numbers are close."""

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


def _words(text: str) -> list[str]:
    return _NUMBER.sub("#", text).replace("-", " ").split()  # rules of tables are as wide as their numbers


def _close(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two numbers, each with its percent sign or "", stand for the same figure."""
    if one[1] != other[1]:
        return False
    a, b = (float(number.replace(",", "")) for number, _ in (one, other))
    if not one[1] and _COUNT.fullmatch(one[0]) and _COUNT.fullmatch(other[0]):
        return a == b
    last_digit = max(_last_digit(one[0]), _last_digit(other[0]))
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=max(1.01 * last_digit, _ABSOLUTE))


def _last_digit(number: str) -> float:
    """What one in the last digit of a printed number stands for."""
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def pytest_collectstart(collector: pytest.Collector) -> None:
    if hasattr(collector, "skip_compare"):  # a notebook of nbval's
        collector.skip_compare += _PICTURES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item, "sanitize"):
            item.sanitize = _tolerant(item.sanitize)  # type: ignore[attr-defined]


def _tolerant(sanitize: Any) -> Any:
    def compared(value: Any) -> Any:
        if isinstance(value, dict | list):
            value = json.dumps(value, sort_keys=True)
        return Tolerant(sanitize(value)) if isinstance(value, str) else value

    return compared
