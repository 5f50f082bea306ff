"""What methods have in common whose layers all get the largest rank within the same share of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from workbench.core.bisection import largest
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.weights.base import Stage, WeightMethod


class Ranked(WeightMethod):
    """Base of methods that replace a weight [o, i] by a product through `rank` dimensions, by default of two thin
    matrices at 16 bits.

    From a share of 1 on the weights stay as they are.
    """

    stage: ClassVar[Stage] = "factor"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None and self.budget.kind != "share":
            raise BadBudget(f"{self.key}: the budget is the share of each layer's bytes (0.8), not {self.budget}")

    @property
    def share(self) -> float:
        """The share of each layer's bytes that may be used."""
        return 1.0 if self.effective_budget is None else self.effective_budget.amount

    def rank_nbytes(self, linear: nn.Linear, rank: int) -> int:
        """Bytes of what stands in for this layer's weight at this rank; more at a larger one."""
        return 2 * rank * sum(linear.weight.shape)

    def rank(self, linear: nn.Linear) -> int:
        """The rank of what stands in for this layer; 0: it stays as it is."""
        if self.share >= 1:
            return 0
        limit = self.share * self.full_nbytes(linear)
        return largest(lambda rank: self.rank_nbytes(linear, rank) <= limit, 0, linear.weight.numel())

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        if self.share >= 1:
            return
        empty = [name for name, linear in linears.items() if self.rank(linear) < 1]
        if empty:
            smallest = max(self.rank_nbytes(linear, 1) / self.full_nbytes(linear) for linear in linears.values())
            smallest = round(smallest + 1e-4, 4)
            raise BudgetTooSmall(
                f"{self.key}: the budget {self.effective_budget} leaves {empty[0]} no rank at all; the smallest "
                f"possible is {smallest:.4g}",
                smallest,
            )

    def nbytes(self, linear: nn.Linear) -> int:
        return self.rank_nbytes(linear, self.rank(linear)) or self.full_nbytes(linear)
