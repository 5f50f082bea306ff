"""Truncated SVD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from workbench.errors import BadBudget, BudgetTooSmall
from workbench.registry import register
from workbench.weights.base import WeightMethod
from workbench.weights.low_rank import LowRankLinear, truncated
from workbench.weights.statistics import InputStats


@register
class SVD(WeightMethod):
    """Replace every weight matrix by the closest product of two thin ones.

    A matrix [o, i] at rank r holds r (o + i) numbers at 16 bits in place of o i; all layers get the largest rank
    within the same share of their bytes. The plain baseline of all low-rank methods: no calibration, the error of the
    weights themselves is the smallest possible (Eckart and Young 1936), that of the outputs is not: the default model
    loses its answers even at 95 % of the bytes. From a share of 1 on the weights stay as they are.
    """

    key = "svd"
    title = "Truncated SVD"
    claim = "what low-rank methods are compared with"
    default_budget = 0.8

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None and self.budget.kind != "share":
            raise BadBudget(f"{self.key}: the budget is the share of each layer's bytes (0.8), not {self.budget}")

    def rank(self, linear: nn.Linear) -> int:
        """The rank of what stands in for this layer; 0: it stays as it is."""
        budget = self.effective_budget
        share = 1.0 if budget is None else budget.amount
        outputs, inputs = linear.weight.shape
        return 0 if share >= 1 else int(share * outputs * inputs / (outputs + inputs))

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        if self.effective_budget is None or self.effective_budget.amount >= 1:
            return
        empty = [name for name, linear in linears.items() if self.rank(linear) < 1]
        if empty:
            smallest = max(sum(linear.weight.shape) / linear.weight.numel() for linear in linears.values())
            smallest = round(smallest + 1e-4, 4)
            raise BudgetTooSmall(
                f"{self.key}: the budget {self.effective_budget} leaves {empty[0]} no rank at all; the smallest "
                f"possible is {smallest:.4g}",
                smallest,
            )

    def nbytes(self, linear: nn.Linear) -> int:
        return 2 * self.rank(linear) * sum(linear.weight.shape) or self.full_nbytes(linear)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        rank = self.rank(linear)
        return LowRankLinear(*truncated(linear.weight, rank), linear.bias) if rank else linear
