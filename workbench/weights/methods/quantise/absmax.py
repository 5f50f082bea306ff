"""Rounding to whole multiples of the largest magnitude's share."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear
from workbench.weights.solvers.quantisation_grid import fit


@register
class AbsMax(Quantiser):
    """Round every weight to a symmetric grid from minus to plus the largest magnitude of its output row.

    The plain integer format that most hardware multiplies: scale = max |w| / (2 ** (bits - 1) - 1), no zero points, no
    calibration; rows as in vector-wise quantisation (section 2 of the paper), or groups of columns. Only weights are
    rounded: LLM.int8() rounds inputs by tokens too, and computes the few columns that hold outliers at 16 bits.
    """

    key = "absmax"
    title = "Absolute maximum"
    paper = Paper(
        "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "Dettmers et al. 2022", "2208.07339"
    )
    claim = "at 8 bits weights alone lose next to nothing"
    fidelity = Fidelity("deviates", "weights alone: inputs are not rounded, so no outliers are split off")
    presets = (Preset("paper", "section 2 and title", bits=8, per="row"),)
    symmetric: ClassVar[bool] = True  # type: ignore[misc]  # no choice here

    bits: Literal[2, 3, 4, 8] = param(8, help="bits of each weight")
    per: Literal["row", "group"] = param("row", help="whether a scale is for a whole row, or for a group of columns")

    def group(self, linear: nn.Linear) -> int:
        return linear.in_features if self.per == "row" else super().group(linear)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        weight = linear.weight.detach().float()
        grid = fit(weight, self.bits, self.group(linear), symmetric=True)
        return self.packed(grid.codes(weight), grid, linear.bias)
