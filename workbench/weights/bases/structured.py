"""What methods have in common whose layers stay plain and become smaller or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from workbench.weights.base import Stage, WeightMethod
from workbench.weights.survey import Survey


class StructuredMethod(WeightMethod):
    """Base of methods whose layers stay plain, at the precision they were in, and become smaller or fewer.

    Budget: the share of the bytes of the layers that are taken, or a size for them. From 1 on all stays as it is.
    """

    measure: ClassVar[str] = "size"
    stage: ClassVar[Stage] = "structure"

    @property
    def together(self) -> str:
        return "what one layer leaves out is missing from the next"

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.weight.numel() * linear.weight.element_size()

    def limit(self, linears: Mapping[str, nn.Linear]) -> int | None:
        """How many bytes these layers may take together; None: as many as they do."""
        full = sum(self.full_nbytes(linear) for linear in linears.values())
        limit = None if self.effective_budget is None else self.effective_budget.nbytes(full)
        return None if limit is None or limit >= full else limit


@dataclass(frozen=True)
class WithinBudget(Survey):
    """A survey of a method that takes what its budget gives: never more than `whole`, and never less than `least`."""

    whole: int
    least: int

    @property
    def nbytes(self) -> int:
        assert isinstance(self.method, StructuredMethod)
        limit = self.method.limit(self.linears)
        return self.whole if limit is None else max(min(limit, self.whole), self.least)
