"""The number up to which a condition holds, in as few tries as halving takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from workbench.core.bisection import boundary, largest, largest_within


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100])
def test_the_largest_that_fits_is_found_wherever_it_lies(low: int, size: int) -> None:
    for last in range(low - 2, low + size + 2):
        tried: list[int] = []

        def fits(number: int, last: int = last, tried: list[int] = tried) -> bool:
            tried.append(number)
            return number <= last

        assert largest(fits, low, low + size) == min(max(last, low), low + size - 1)
        assert all(low < number < low + size for number in tried), "an end was tried"
        assert len(tried) == len(set(tried)) <= (size - 1).bit_length()


MEASURES: dict[str, Callable[[int], float]] = {
    "proportional": lambda number: 512.0 * number,
    "in steps": lambda number: 512.0 * (number // 256),
    "with much beside": lambda number: 1e9 + 3.0 * number,
    "bent": lambda number: float(number) ** 2,
    "nothing at first": lambda number: max(number - 500_000, 0),
    "everything at once": lambda number: 7.0 * (number > 300_000),
}


EVEN = ("proportional", "in steps", "with much beside")


@pytest.mark.parametrize("name", MEASURES)
def test_what_grows_evenly_is_found_in_few_tries_and_anything_else_is_found_too(name: str) -> None:
    measure, low, high = MEASURES[name], 5, 1_000_000
    for limit in (-1.0, 0.0, *(measure(high) * share for share in (1e-6, 0.1, 0.25, 0.5, 0.9, 0.9999)), measure(high)):
        tried: list[int] = []

        def watched(number: int, tried: list[int] = tried) -> float:
            tried.append(number)
            return measure(number)

        wanted = largest(lambda number, limit=limit: measure(number) <= limit, low, high)
        for at_high in (measure(high), 1.0, 1e12):  # what it says is only a guess
            tried.clear()
            assert largest_within(watched, limit, low, high, at_high) == wanted
            assert all(low < number < high for number in tried), "an end was tried"
            assert len(tried) <= (14 if name in EVEN and at_high == measure(high) else 45)


@pytest.mark.parametrize(("inside", "outside"), [(0.0, 1.0), (1.0, 0.0), (-3.0, 5.0)])
@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.999])
def test_a_boundary_is_approached_from_the_side_that_fits(inside: float, outside: float, share: float) -> None:
    end = inside + share * (outside - inside)
    rising = outside > inside

    def fits(number: float) -> bool:
        return number <= end if rising else number >= end

    near = boundary(fits, inside, outside)
    assert fits(near) and near == pytest.approx(end, abs=1e-14)
    coarse = boundary(fits, inside, outside, tolerance=0.01)
    assert fits(coarse) and abs(coarse - end) <= 0.01
    assert boundary(fits, inside, outside, steps=0) == inside
