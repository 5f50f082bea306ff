"""What waits says what it waited for."""

from __future__ import annotations

import pytest

from tests.waiting import changed, until


def test_what_was_waited_for_is_given_back() -> None:
    steps = iter([0, 0, 7])
    assert until(lambda: next(steps)) == 7
    steps = iter([1, 1, 0])
    assert changed(lambda: next(steps), 1) == 0


def test_a_wait_in_vain_says_for_what() -> None:
    held: list[int] = []
    with pytest.raises(AssertionError, match=r"waited 0 s for until\(lambda: held, 0\), and it is still \[\]") as vain:
        until(lambda: held, 0)
    assert "\n" not in str(vain.value)
    with pytest.raises(AssertionError, match="waited 0 s for the answer, and it is still False"):
        until(lambda: bool(held), 0, "the answer")
    with pytest.raises(AssertionError, match="waited 0 s for anything but 3"):
        changed(lambda: 3, 3, 0)
