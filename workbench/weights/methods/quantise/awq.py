"""AWQ: columns that meet large inputs are scaled up before rounding, and back down afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.core.precision import half
from workbench.registry import Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.solvers.quantisation_grid import Grid, fit_least

_STEPS = 20  # exponents that are tried, from 0 to below 1
_SHRINKS = tuple(1 - step / 20 for step in range(10))  # of the range that a clipped group covers, down to 0.55
_LEAST = 1e-4  # mean magnitude of an input channel: smaller ones are no smaller for the scales


def awq_columns(weight: Tensor, inputs: InputStats, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """What the columns of a weight [o, i] are divided by before rounding and multiplied by afterwards [i].

    The scales are the inputs' mean magnitudes to some power from 0 (plain rounding) to 1, that which changes the
    outputs least, tr(Δ M Δᵀ); their geometric middle is 1 (Lin et al. 2023, arXiv:2306.00978, equations 4 and 5).
    nearest: rounds a scaled weight. The factors are what float16 makes of the scales' inverses.
    """
    size = inputs.absmean.clamp_min(_LEAST)
    best: Tensor | None = None
    least = float("inf")
    for step in range(_STEPS):
        scales = size ** (step / _STEPS)
        columns = half((scales.max() * scales.min()).sqrt() / scales, "the factors of its columns").float()
        change = nearest(weight / columns).mul_(columns).sub_(weight)
        error = float(inputs.output_error(change).sum())
        if best is None or error < least:
            best, least = columns, error
    assert best is not None
    return best


def group_errors(change: Tensor, hessian: Tensor, group: int) -> Tensor:
    """Mean squares of what each group of columns of a change [o, i] adds to an output by itself [o, g].

    hessian: of the inputs [i, i], of which only the groups' own blocks are looked at.
    """
    groups = pad(change, (0, -change.shape[1] % group)).unflatten(1, (-1, group)).transpose(0, 1)  # [g, o, c]
    errors: Tensor = ((groups @ _own_blocks(hessian, group)) * groups).sum(dim=-1).T
    return errors


def _own_blocks(hessian: Tensor, group: int) -> Tensor:
    """The blocks of a Hessian [i, i] that belong to one group each [g, c, c]; zeros beyond the last column."""
    more = -len(hessian) % group
    whole = pad(hessian, (0, more, 0, more)).unflatten(0, (-1, group)).unflatten(2, (-1, group))  # [g, c, g, c]
    own: Tensor = whole.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return own


@register
class AWQ(Quantiser):
    """Scale the columns that meet large inputs up before rounding, so that they lose less, and clip each group's range.

    Every layer searches its own scales, also where several share an input, and keeps them itself (two bytes a column):
    nothing before the layer is touched, and no layer has to suit another. Both searches minimise what rounding changes
    in the outputs over the calibration texts: the scales in all columns together (section 3.2), the clipping (as in the
    authors' code) group by group, and only in rows whose whole output is the better for it. Hessians are those of the
    uncompressed model.
    """

    key = "awq"
    title = "AWQ"
    paper = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        "Lin et al. 2023",
        "2306.00978",
    )
    claim = "4 bits nearly without loss, by protecting the one percent of channels that matter"
    needs_hessian = True

    clip: bool = param(True, help="also search how much of each group's range to cover")

    def nbytes(self, linear: nn.Linear) -> int:
        zero_bytes = 0 if self.symmetric else self.zero_bytes
        shape = linear.out_features, linear.in_features
        return packed_nbytes(*shape, self.bits, self.group(linear), zero_bytes=zero_bytes, columns=True)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        assert inputs is not None
        weight = linear.weight.detach().float()
        columns = awq_columns(weight, inputs, lambda scaled: self.grid(scaled).nearest(scaled))
        scaled = weight / columns
        grid = self.grid(scaled)
        if self.clip:
            grid = self._clipped(scaled, columns, inputs, grid)
        return self.packed(grid.codes(scaled), grid, linear.bias, columns)

    def _clipped(self, scaled: Tensor, columns: Tensor, inputs: InputStats, whole: Grid) -> Grid:
        """A grid for the scaled weight [o, i] that leaves out the ends of groups where that helps their row."""
        hessian = columns[:, None] * inputs.hessian * columns  # of what the scaled columns meet
        clipped = fit_least(
            scaled,
            self.bits,
            whole.group,
            _SHRINKS,
            lambda change: group_errors(change, hessian, whole.group),
            symmetric=self.symmetric,
        )
        with_all, without = (
            inputs.output_error((grid.nearest(scaled) - scaled) * columns)[:, None] for grid in (whole, clipped)
        )
        better = without < with_all  # [o, 1]
        return Grid(
            torch.where(better, clipped.scale, whole.scale),
            torch.where(better, clipped.zero, whole.zero),
            self.bits,
            whole.group,
        )
