"""Round to nearest."""

from __future__ import annotations

from torch import nn

from workbench.registry import Fidelity, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear


@register
class RTN(Quantiser):
    """Round every weight to the nearest level of its group, between the group's own minimum and maximum.

    The plain baseline of all weight quantisers: no calibration, no optimisation. After a pruning method, what was left
    out stays zero.
    """

    key = "rtn"
    title = "Round to nearest"
    claim = "what weight quantisers are compared with"
    fidelity = Fidelity("baseline")
    takes_pruned = True

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        weight = linear.weight.detach().float()
        grid = self.grid(weight)
        return self.held(grid.codes(weight), grid, linear)
