"""What a search is for: limits, bounds of quality, and which recipe serves better."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.errors import BadBudget, BadParameter
from workbench.search.goal import Goal, Measured, memory_of


def row(**changes: Any) -> dict[str, Any]:
    made = {
        "status": "done", "error": None, "kv_nbytes": 10, "kv_host_nbytes": 3, "total_nbytes": 110,
        "deployed_nbytes": 60, "correct": True, "full_correct": True, "kl": 0.1, "top1": 0.9,
    }  # fmt: skip
    return {**made, **changes}


def test_memory_counts_what_is_asked_for() -> None:
    kinds: Any = ("total", "device", "deployed", "kv")
    assert [memory_of(row(), memory) for memory in kinds] == [113, 110, 63, 13]


def test_figures_are_means_and_memory_is_that_of_the_largest_case() -> None:
    found = Measured.of([row(), row(total_nbytes=200, correct=False, kl=0.3, kv_host_nbytes=None)], "total")
    assert (found.cases, found.memory, found.correct, found.full_correct, found.judged) == (2, 200, 1, 2, 2)
    assert found.kl == pytest.approx(0.2) and found.wrong_share == 0.5
    nothing = Measured.of([row(correct=None, full_correct=None)], "kv")
    assert nothing.judged == 0 and nothing.wrong_share == 0.0
    failed = Measured.of([row(), row(status="failed", error="too small")], "total")
    assert failed.error == "too small" and not Goal(1000).serves(failed)


def test_within_a_limit_right_answers_come_before_kl_and_kl_before_bytes() -> None:
    goal = Goal(100)
    best = Measured(4, memory=90, correct=4, judged=4, kl=0.3)
    less_kl = Measured(4, memory=95, correct=4, judged=4, kl=0.2)
    smaller = Measured(4, memory=20, correct=3, judged=4, kl=0.1)
    beyond = Measured(4, memory=101, correct=4, judged=4, kl=0.0)
    broken = Measured(4, error="no")
    order = sorted([broken, beyond, smaller, best, less_kl], key=goal.place)
    assert order == [less_kl, best, smaller, beyond, broken]
    assert goal.serves(best) and not goal.serves(beyond)


def test_within_bounds_of_quality_the_smallest_is_best() -> None:
    goal = Goal(None, "total", (("correct", 0.95), ("kl", 0.2)))
    large = Measured(20, memory=90, correct=20, full_correct=20, judged=20, kl=0.0)
    small = Measured(20, memory=50, correct=19, full_correct=20, judged=20, kl=0.2)
    wrong = Measured(20, memory=10, correct=18, full_correct=20, judged=20, kl=0.0)
    assert sorted([large, wrong, small], key=goal.place) == [small, large, wrong]
    assert [goal.serves(each) for each in (large, small, wrong)] == [True, True, False]
    assert goal.constraints(wrong) == (0.0, pytest.approx(0.05))


def test_what_is_no_goal_is_refused_in_one_line() -> None:
    for limit, memory, quality, error, said in (
        (None, "total", None, BadParameter, "needs a limit"),
        ("25%", "total", None, BadBudget, "is no size"),
        ("1 MiB", "peak", None, BadParameter, "memory"),
        ("1 MiB", "kv", {"ppl": 1}, BadParameter, "kl, correct, top1"),
        ("1 MiB", "kv", {"kl": -1}, BadParameter, "not negative"),
        ("1 MiB", "kv", {"correct": 95}, BadParameter, "0 to 1"),
    ):
        with pytest.raises(error, match=said):
            Goal.of(limit, memory, quality)  # type: ignore[arg-type]
    assert Goal.of("1 KiB", "kv", {"kl": 0.02}) == Goal(1024, "kv", (("kl", 0.02),))
