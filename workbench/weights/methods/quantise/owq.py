"""OWQ: the columns that would hurt most stay at 16 bits, the rest is rounded as GPTQ does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear, DenseLinear, Parts, packed_nbytes
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.quantisation_grid import Grid
from workbench.weights.solvers.range_search import searched


def weak_columns(change: Tensor, square: Tensor, count: int) -> Tensor:
    """The columns that rounding hurts most, ascending int64 [count].

    A column's sensitivity is the mean square of its input [i] times the squared norm of its change [o, i] (Lee et al.
    2023, arXiv:2306.02272, equation 4).
    """
    sensitivity = square * change.square().sum(dim=0)
    return sensitivity.argsort(descending=True, stable=True)[:count].sort().values


@register
class OWQ(Sequential, Quantiser):
    """Keep each layer's most sensitive columns at 16 bits, and round the others by GPTQ on truncated grids.

    The weak columns come last in GPTQ's order, so they also take up what the others lose. The grid of each group is the
    best of many steps and zeros (`searched`, the paper's "quantisation configuration" search); weak are the columns
    that rounding on such grids hurts most. How many that are is a share of each layer's columns, the same for all
    layers; the authors' code gives the layers of a Llama's MLP 0.375 of that share, and rounds to an even number.
    """

    key = "owq"
    title = "OWQ"
    paper = Paper(
        "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
        "Lee et al. 2023",
        "2306.02272",
    )
    claim = "3.1 bits a weight as good as 4 bits by OPTQ (GPTQ)"
    fidelity = Fidelity("deviates", "the same share of weak columns in every layer, and scales for groups of columns")
    presets = (
        Preset(
            "authors",
            "xvyaward/owq, main.py and owq/recon.py, 03cfc99",
            symmetric=False,
            ranges=40,
            damping=0.01,
            sequential=True,
        ),
    )
    needs_hessian = True

    bits: Literal[2, 3, 4] = param(3, help="bits of each weight but the weak ones", own="those of the claim")
    weak: float = param(
        0.01,
        ge=0,
        le=0.5,
        help="share of each layer's columns that stay at 16 bits",
        own="the claim's 3.1 bits are 0.008 of the columns, which is less than one of 96",
    )
    ranges: int = param(40, ge=1, le=200, help="how many steps are tried for each group, each with every zero")
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")

    def count(self, linear: nn.Linear) -> int:
        """How many columns of this layer stay at 16 bits."""
        return round(self.weak * linear.in_features)

    def nbytes(self, linear: nn.Linear) -> int:
        out_features, in_features, weak = linear.out_features, linear.in_features, self.count(linear)
        zero_bytes = 0 if self.symmetric else self.zero_bytes
        rest = in_features - weak
        packed = packed_nbytes(out_features, rest, self.bits, min(self.group_size, rest), zero_bytes=zero_bytes)
        places = (2 if in_features <= 2**15 else 4) * in_features  # which columns each part takes
        return packed + (2 * out_features * weak + places if weak else 0)

    def grid(self, weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
        """The best grid of each group of weight [o, i], whatever `shrink` says."""
        group = min(self.group_size, weight.shape[1])
        return searched(weight, self.bits, group, self.ranges, symmetric=self.symmetric)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        assert inputs is not None
        weight = linear.weight.detach().float()
        weak = weak_columns(self.grid(weight).nearest(weight) - weight, inputs.square, self.count(linear))
        rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, weak, False)
        strong = rest.nonzero()[:, 0]
        order = torch.cat([strong, weak])
        group = min(self.group_size, len(strong))
        done = gptq(
            weight[:, order],
            inputs.hessian[order][:, order],
            lambda part, _: self.grid(part),
            group,
            damping=self.damping,
            exact=len(weak),
        )
        grid = Grid(done.scale, done.zero, self.bits, group)
        if not len(weak):
            return self.packed(done.codes, grid, linear.bias)
        kept = DenseLinear(checked(done.exact, linear.weight.dtype, "its weak columns"))
        return Parts([self.packed(done.codes, grid, None), kept], [strong, weak], weight.shape[1], linear.bias)
