"""Wanda."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from workbench.registry import Fidelity, Paper, Preset, register
from workbench.weights.bases.pruner import Pruner
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.solvers.sparsity import largest_by_row, largest_in_groups


def wanda_scores(weight: Tensor, inputs: InputStats) -> Tensor:
    """The size of each weight times the norm of its input over calibration, float32 [o, i] (Sun et al. 2023, eq. 1)."""
    return weight.float().abs() * inputs.square.sqrt()


@register
class Wanda(Sequential, Pruner):
    """Leave out the weights whose size times the norm of their input is smallest, output by output.

    Scores are compared within each row of a matrix, so that all outputs keep as many weights (Sun et al. 2023, section
    3); where the budget leaves some over, they go to the rows whose next weight scores highest. Weights that stay are
    not changed. With `sequential`, as in the paper, each block is calibrated on the outputs of those pruned before it.
    """

    key = "wanda"
    title = "Wanda"
    paper = Paper("A Simple and Effective Pruning Approach for Large Language Models", "Sun et al. 2023", "2306.11695")
    claim = "half of the weights pruned in one pass, far better than by magnitude, without any update of the rest"
    fidelity = Fidelity("as published")
    presets = (Preset("authors", "locuslab/wanda, lib/prune.py, 4651156", sequential=True),)
    needs_inputs: ClassVar[bool] = True

    def prune(self, weight: Tensor, count: int, inputs: InputStats | None) -> tuple[Tensor, Tensor]:
        assert inputs is not None
        scores = wanda_scores(weight, inputs)
        if self.pattern == "unstructured":
            return weight, largest_by_row(scores, count)
        return weight, largest_in_groups(scores, self.pattern)
