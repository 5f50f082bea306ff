"""Bisection: where a condition that holds up to some number ceases to hold."""

from __future__ import annotations

from collections.abc import Callable

_NEAR = 256  # so near a guess is worth no better one
_GUESSES = 3


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number of [low, high) that fits; `low` where none does.

    Below a number that fits all must fit. Neither end is tried.
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_within(measure: Callable[[int], float], limit: float, low: int, high: int, at_high: float) -> int:
    """The largest number of [low, high) whose measure is at most `limit`; `low` where none's is.

    For a measure that grows about evenly and never shrinks, and is `at_high` at the end: each try says where the next
    should be, and what then remains on one side of it is halved. Half as many tries as halving alone takes. Neither end
    is tried.
    """
    guess = int(high * max(limit, 0) / at_high) if at_high > 0 else high
    known, there = high, at_high
    step = guesses = 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = measure(guess)
        fits = found <= limit
        low, high = (guess, high) if fits else (low, guess)
        slope = (there - found) / (known - guess) if known != guess else 0
        known, there = guess, found
        expected = guess + int((limit - found) / slope) if slope > 0 else guess
        if abs(expected - guess) > _NEAR and step == 0 and guesses < _GUESSES:
            guess, guesses = expected, guesses + 1
            continue
        if step * (1 if fits else -1) < 0:  # it lies between this try and the one before
            break
        step = 4 * step or (_NEAR if fits else -_NEAR)
        guess += step
    return largest(lambda number: measure(number) <= limit, low, high)


def boundary(
    fits: Callable[[float], bool], inside: float, outside: float, *, steps: int = 60, tolerance: float = 0.0
) -> float:
    """The number nearest to `outside` that fits, where what fits lies on the side of `inside`.

    Halves the distance `steps` times, fewer where it comes within `tolerance`. Neither end is tried, so it is `inside`
    where nothing nearer fits.
    """
    for _ in range(steps):
        if abs(outside - inside) <= tolerance:
            break
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside
