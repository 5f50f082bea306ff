"""What a promise that is broken raises."""

from __future__ import annotations

from torch import Tensor


class MethodProblem(AssertionError):
    """A promise that a method breaks: its key, the promise, and what was seen."""


def must(kept: bool | Tensor, broken: str) -> None:
    """Raise MethodProblem, saying what is `broken`, unless this is so."""
    if not kept:
        raise MethodProblem(broken)
