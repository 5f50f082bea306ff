"""What methods that leave out single weights have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from workbench.errors import BudgetTooSmall
from workbench.registry import param
from workbench.weights.base import Stage, WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import SparseLinear, sparse_nbytes
from workbench.weights.solvers.sparsity import Pattern, groups_of
from workbench.weights.survey import Survey


class Pruner(WeightMethod):
    """Base of methods that leave out single weights and hold the others at 16 bits beside a bitmap.

    Budget: the share of every layer's 16-bit bytes, the bitmap and the rows' offsets counted: half of the weights take
    a little more than 0.5625. Each layer holds exactly as many weights as fit; from 1 on it stays as it is. A size is
    shared out in proportion. The patterns 2:4 and 4:8 take 0.5625 always, and a budget is only held against that.
    """

    default_budget = 0.5625
    stage: ClassVar[Stage] = "select"

    pattern: Pattern = param(
        "unstructured",
        help="which weights may be left out: any, or 2 in every 4, or 4 in every 8",
        own="papers give tables for each pattern",
    )

    def refuses(self, linear: nn.Linear) -> str | None:
        if not linear.weight.is_floating_point():
            return f"its weight is {linear.weight.dtype}, not floating point"
        if self.pattern != "unstructured" and linear.in_features % groups_of(self.pattern)[1]:
            return f"its {linear.in_features} columns are no whole groups of {groups_of(self.pattern)[1]}"
        return None

    def survey(self, model: nn.Module) -> Survey:
        survey = Survey.of(model, self)
        budget = survey.method.budget
        if budget is None or budget.kind != "bytes":
            return survey
        return replace(survey, method=self.with_budget(min(budget.amount / survey.full_nbytes, 1.0)))

    def check(self, linears: Mapping[str, nn.Linear]) -> None:
        budget = self.effective_budget
        if self.pattern != "unstructured" or budget is None or budget.kind != "share":
            return
        needed = {
            name: sparse_nbytes(x.out_features, x.in_features, 1) / self.full_nbytes(x) for name, x in linears.items()
        }
        most = max(needed, key=lambda name: needed[name])
        if budget.amount < needed[most]:
            smallest = math.ceil(needed[most] * 1e4) / 1e4
            raise BudgetTooSmall(
                f"{self.key}: the budget {budget} is less than the bitmap of {most}; the smallest possible is "
                f"{smallest:.4g}",
                smallest,
            )

    def count(self, linear: nn.Linear) -> int:
        """How many weights of a layer stay."""
        outputs, inputs = linear.weight.shape
        if self.pattern != "unstructured":
            kept, of = groups_of(self.pattern)
            return outputs * inputs // of * kept
        budget = self.effective_budget
        limit = None if budget is None else budget.nbytes(self.full_nbytes(linear))
        if limit is None or limit >= self.full_nbytes(linear):
            return outputs * inputs
        return max(limit - sparse_nbytes(outputs, inputs, 0), 0) // 2

    def nbytes(self, linear: nn.Linear) -> int:
        count = self.count(linear)
        if count == linear.weight.numel():
            return self.full_nbytes(linear)
        return sparse_nbytes(linear.out_features, linear.in_features, count, even=self.pattern != "unstructured")

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        count = self.count(linear)
        if count == linear.weight.numel():
            return linear
        weight, kept = self.prune(linear.weight.detach(), count, inputs)
        return SparseLinear(weight, kept, linear.bias)

    def prune(self, weight: Tensor, count: int, inputs: InputStats | None) -> tuple[Tensor, Tensor]:
        """What becomes of weight [o, i] and which `count` of it stay, bool [o, i]; the weight itself is not written to.

        count: whole groups by the pattern, where there is one.
        """
        raise NotImplementedError
