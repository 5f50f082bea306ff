"""The number up to which a condition holds, in as few tries as halving takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.core.bisection import boundary, largest, largest_each


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


def test_many_are_found_at_once() -> None:
    last = torch.arange(-3, 30)

    def fits(numbers: Tensor) -> Tensor:
        return numbers <= last

    for beyond in (1, 2, 5, 16, 17):
        found = largest_each(fits, torch.zeros_like(last), beyond)
        assert found.tolist() == [largest(lambda number, end=end: number <= end, 0, beyond) for end in last.tolist()]


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
