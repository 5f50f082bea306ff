"""SparseGPT."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from workbench.core.precision import checked
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.pruner import Pruner
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.solvers.compensation import Replacing, compensated, removal_cost
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.sparsity import Pattern, groups_of, largest, largest_in_groups


def sparsegpt(
    weight: Tensor, factor: Tensor, count: int, pattern: Pattern = "unstructured", block: int = 128
) -> tuple[Tensor, Tensor]:
    """Weights [o, i] of which `count` stay, corrected for what was left out, float32; and which those are, bool [o, i].

    Columns are taken from left to right. Of each block, those weights go whose loss costs least, w² / (H⁻¹)_jj, H⁻¹
    without the columns already done; what a column loses is made up for by those to its right (Frantar and Alistarh
    2023, algorithm 1). factor: from `inverse_factor`. The number that stays is exact: each block keeps its share of
    `count`, rounded so that the sum is right. By a pattern, each group is chosen when its first column is reached.
    """
    pivots = factor.diagonal()
    inputs = weight.shape[1]
    kept = torch.zeros_like(weight, dtype=torch.bool)
    every = 0 if pattern == "unstructured" else groups_of(pattern)[1]

    def prepare(first: int, part: Tensor) -> Replacing:
        last = first + part.shape[1]
        if not every:
            quota = count * last // inputs - count * first // inputs
            kept[:, first:last] = largest(removal_cost(part, pivots[first:last]), quota)

        def prune(column: Tensor, at: int) -> Tensor:
            if every and at % every == 0:
                group = slice(at, at + every)
                now = part[:, at - first : at - first + every]  # as the columns before have changed it
                kept[:, group] = largest_in_groups(removal_cost(now, pivots[group]), pattern)
            return column * kept[:, at]

        return prune

    return compensated(weight, factor, prepare, block), kept


@register
class SparseGPT(Sequential, Pruner):
    """Leave out the weights that cost least by second-order information, and let the rest of their row make up for it.

    What is minimised is the change of each layer's outputs over calibration (Frantar and Alistarh 2023). With
    `sequential`, as in the paper, each block is calibrated on the outputs of those pruned before it. Inputs that never
    were active keep their weights' relative sizes: they are damped, not dropped. The paper's joint pruning and rounding
    (section 3.5) goes column by column; in a recipe with GPTQ here weights are pruned first, and then rounded, where
    the weights that stay make up for both.
    """

    key = "sparsegpt"
    title = "SparseGPT"
    paper = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Frantar and Alistarh 2023",
        "2301.00774",
    )
    claim = "at least half of the weights pruned in one shot with minimal loss"
    fidelity = Fidelity("as published")
    presets = (Preset("authors", "IST-DASLab/sparsegpt, llama.py, ceb3dc6", block=128, damping=0.01, sequential=True),)
    needs_hessian: ClassVar[bool] = True

    block: int = param(128, ge=8, le=1024, multiple_of=8, unit="columns", help="how many are chosen together")
    damping: float = param(
        0.01, ge=1e-6, le=1, help="added to the diagonal of the inputs' Hessian, as a share of its mean"
    )

    def prune(self, weight: Tensor, count: int, inputs: InputStats | None) -> tuple[Tensor, Tensor]:
        assert inputs is not None
        factor = inverse_factor(inputs.hessian, self.damping)
        corrected, kept = sparsegpt(weight, factor, count, self.pattern, self.block)
        return checked(corrected, weight.dtype, "its weights"), kept
