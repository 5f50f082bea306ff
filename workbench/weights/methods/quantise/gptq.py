"""GPTQ: columns rounded one after another, each error undone as far as possible by the columns that follow."""

from __future__ import annotations

from torch import nn

from workbench.registry import Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.quantisation_grid import Grid


@register
class GPTQ(Quantiser):
    """Round the columns of a weight in turn, and let those still to come make up for what each loses.

    Each layer is solved by itself on the Hessian of its inputs; see `gptq` for the order of columns and `rtn` for
    the grid. The Hessians are those of the uncompressed model, gathered once for every setting, where the paper takes
    them anew behind the blocks that it has compressed already.
    """

    key = "gptq"
    title = "GPTQ"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar et al. 2022",
        "2210.17323",
    )
    claim = "175 billion parameters at 3 or 4 bits in four GPU hours, with negligible loss"
    needs_hessian = True

    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")
    act_order: bool = param(False, help="round the columns with the largest inputs first, on grids fixed beforehand")

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        assert inputs is not None
        weight, group = linear.weight.detach(), self.group(linear)
        done = gptq(
            weight,
            inputs.hessian,
            lambda part, _: self.grid(part),
            group,
            damping=self.damping,
            act_order=self.act_order,
        )
        return self.packed(done.codes, Grid(done.scale, done.zero, self.bits, group), linear.bias)
