"""OWQ: the columns that would hurt most stay at 16 bits, the rest is rounded as GPTQ does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.core.precision import checked
from workbench.registry import Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear, DenseLinear, Parts, packed_nbytes
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.quantisation_grid import Grid, fit_least, squares

_SHRINKS = tuple(1 - step / 25 for step in range(15))  # of the range that a group covers, down to 0.44


def weak_columns(change: Tensor, square: Tensor, count: int) -> Tensor:
    """The columns that rounding hurts most, ascending int64 [count].

    A column's sensitivity is the mean square of its input [i] times the squared norm of its change [o, i] (Lee et al.
    2023, arXiv:2306.02272, equation 4).
    """
    sensitivity = square * change.square().sum(dim=0)
    return sensitivity.argsort(descending=True, stable=True)[:count].sort().values


@register
class OWQ(Quantiser):
    """Keep each layer's most sensitive columns at 16 bits, and round the others by GPTQ on truncated grids.

    The weak columns come last in GPTQ's order, so they also take up what the others lose. The grid of each group covers
    the share of its range that minimises the squared error of its weights (the paper's "quantisation configuration"
    search, whose steps it leaves open: 15, down to 44 %). How many columns are weak is a share of each layer's columns,
    the same for all layers, as in the paper's experiments. Hessians are those of the uncompressed model.
    """

    key = "owq"
    title = "OWQ"
    paper = Paper(
        "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and Inference of Large Language Models",
        "Lee et al. 2023",
        "2306.02272",
    )
    claim = "3.1 bits a weight as good as 4 bits by OPTQ (GPTQ)"
    needs_hessian = True

    weak: float = param(0.01, ge=0, le=0.5, help="share of each layer's columns that stay at 16 bits")
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

    def truncated(self, weight: Tensor) -> Grid:
        """The grid of weight [o, i] that covers the best share of each group's range."""
        group = min(self.group_size, weight.shape[1])
        return fit_least(
            weight, self.bits, group, _SHRINKS, lambda change: squares(change, group), symmetric=self.symmetric
        )

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        assert inputs is not None
        weight = linear.weight.detach().float()
        weak = weak_columns(self.truncated(weight).nearest(weight) - weight, inputs.square, self.count(linear))
        rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device).index_fill_(0, weak, False)
        strong = rest.nonzero()[:, 0]
        order = torch.cat([strong, weak])
        group = min(self.group_size, len(strong))
        done = gptq(
            weight[:, order],
            inputs.hessian[order][:, order],
            lambda part, _: self.truncated(part),
            group,
            damping=self.damping,
            exact=len(weak),
        )
        grid = Grid(done.scale, done.zero, self.bits, group)
        if not len(weak):
            return self.packed(done.codes, grid, linear.bias)
        kept = DenseLinear(checked(done.exact, linear.weight.dtype, "its weak columns"))
        return Parts([self.packed(done.codes, grid, None), kept], [strong, weak], weight.shape[1], linear.bias)
