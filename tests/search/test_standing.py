"""Fronts of several figures and successive halving, against plain loops."""

from __future__ import annotations

import random

import pytest

from workbench.search.standing import dominated, layers, promoted, rungs


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_behind_where_another_is_no_worse_and_somewhere_better(seed: int) -> None:
    draw = random.Random(seed)
    points = [[draw.randint(0, 3) for _ in range(3)] for _ in range(30)]

    def beats(a: list[int], b: list[int]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    assert dominated(points) == [any(beats(other, each) for other in points) for each in points]
    numbers = layers(points)
    for point, number in zip(points, numbers, strict=True):
        before = [n for other, n in zip(points, numbers, strict=True) if beats(other, point)]
        assert number == max(before, default=-1) + 1


def test_equal_points_are_both_in_front() -> None:
    assert dominated([[1, 1], [1, 1], [2, 1]]) == [False, False, True]
    assert dominated([]) == []


def test_the_screen_is_one_case_and_the_last_step_all() -> None:
    assert [rungs(count) for count in (1, 2, 3, 8, 12, 30)] == [[1], [1, 2], [1, 3], [1, 2, 8], [1, 4, 12], [1, 10, 30]]
    assert [rungs(count, 3) for count in (2, 3, 6, 12)] == [[2], [3], [3, 6], [3, 4, 12]]


def test_the_best_third_of_a_rung_goes_on_once() -> None:
    order = ["a", "b", "c", "d", "e", "f", "g"]
    on = dict.fromkeys(order, 0)
    assert promoted(order, on, 0) == ["a", "b", "c"]
    on |= {"a": 1, "b": 1, "c": 1}
    assert promoted(order, on, 0) == []
    assert promoted(order, on, 1) == ["a"]
    assert promoted(["new", *order], {"new": 0, **on}, 0) == ["new"]
