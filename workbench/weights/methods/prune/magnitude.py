"""Magnitude pruning."""

from __future__ import annotations

from torch import Tensor

from workbench.registry import Fidelity, Paper, register
from workbench.weights.bases.pruner import Pruner
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.solvers.sparsity import largest, largest_in_groups


@register
class Magnitude(Pruner):
    """Leave out the weights that are smallest in size.

    The same share of every layer, compared within the layer as a whole (within each group, where there is a pattern).
    The plain baseline of all pruning: no calibration, no correction, and no training after it.
    """

    key = "magnitude"
    title = "Magnitude pruning"
    paper = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks", "Han et al. 2015", "1506.02626"
    )
    claim = "what pruning methods are compared with"
    fidelity = Fidelity("deviates", "one pass without the training between several that the paper has")

    def prune(self, weight: Tensor, count: int, inputs: InputStats | None) -> tuple[Tensor, Tensor]:
        sizes = weight.float().abs()
        if self.pattern == "unstructured":
            return weight, largest(sizes, count)
        return weight, largest_in_groups(sizes, self.pattern)
