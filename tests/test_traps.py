"""Every trap of TRAPS.md is named by a test, or a remark there says why there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRAP = re.compile(r"^(?:- )?(W?\d+)\. (.*)$", re.MULTILINE)
TRAPS = dict(TRAP.findall((HERE / "TRAPS.md").read_text(encoding="utf-8")))
NAMED = {
    number
    for path in HERE.rglob("test_*.py")
    for numbers in re.findall(r"\b[Tt]raps? (W?\d+(?:, ?W?\d+)*)", path.read_text(encoding="utf-8"))
    for number in re.findall(r"W?\d+", numbers)
}


def test_the_traps_are_numbered_without_a_gap() -> None:
    assert list(TRAPS) == [*map(str, range(1, 24)), *(f"W{number}" for number in range(1, 11))]


@pytest.mark.parametrize("number", list(TRAPS))
def test_a_trap_is_guarded_by_a_test_or_has_its_remark(number: str) -> None:
    assert number in NAMED or TRAPS[number].endswith(".)"), TRAPS[number]


def test_no_test_names_a_trap_that_is_not_listed() -> None:
    assert set(TRAPS) >= NAMED
