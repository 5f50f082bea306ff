"""GPTQ: columns rounded one after another, each error undone as far as possible by the columns that follow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from workbench.errors import BadParameter
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear
from workbench.weights.layers.masked import kept_of
from workbench.weights.solvers.gptq import Order, gptq
from workbench.weights.solvers.quantisation_grid import Grid, fit_range


@register
class GPTQ(Sequential, Quantiser):
    """Round the columns of a weight in turn, and let those still to come make up for what each loses.

    Each layer is solved by itself on the Hessian of its inputs; see `gptq` for the order of columns and `rtn` for
    the grid. With `sequential`, as in the paper's section 3.3, these are the inputs behind the blocks that are
    compressed already; within a block all layers are shown those of the plain block (the authors' `--true-sequential`
    is not here). Hessians count the texts' first tokens more (`InputStats`), and channels that were never seen are
    rounded to nearest where the authors' code sets them to zero. After a pruning method, what was left out stays zero.
    """

    key = "gptq"
    title = "GPTQ"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar et al. 2022",
        "2210.17323",
    )
    claim = "175 billion parameters at 3 or 4 bits in four GPU hours, with negligible loss"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "authors",
            "IST-DASLab/gptq, llama.py, 9f2abd3",
            damping=0.01,
            act_order=False,
            mse=False,
            symmetric=False,
            sequential=True,
        ),
        Preset("gptqmodel", "ModelCloud/GPTQModel, gptqmodel/quantization/gar_ref.py, f4b56e7", group_aware=True),
    )
    needs_hessian = True
    takes_pruned = True

    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")
    act_order: bool = param(False, help="round the columns with the largest inputs first, on grids fixed beforehand")
    group_aware: bool = param(
        False,
        help="round the groups with the largest inputs first, and within each its largest columns",
        own="the authors' code has no such order; GPTQModel's has",
    )
    mse: bool = param(False, help="search how much of each group's range to cover")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.act_order and self.group_aware:
            raise BadParameter(f"{self.key}: act_order and group_aware are two orders of columns; choose one")

    @property
    def order(self) -> Order:
        """In which order columns are rounded."""
        return "activations" if self.act_order else "groups" if self.group_aware else "columns"

    def grid(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
        if not self.mse:
            return super().grid(weight, shrink)
        group = min(self.group_size, weight.shape[1])
        return fit_range(weight, self.bits, group, symmetric=self.symmetric, every_level=True)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        assert inputs is not None
        weight, group = linear.weight.detach(), self.group(linear)
        done = gptq(
            weight,
            inputs.hessian,
            lambda part, _: self.grid(part),
            group,
            damping=self.damping,
            order=self.order,
            kept=kept_of(linear),
        )
        return self.held(done.codes, Grid(done.scale, done.zero, self.bits, group), linear)
