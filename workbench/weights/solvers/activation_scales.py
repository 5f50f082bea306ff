"""Scales of columns by the inputs that they meet, and ranges of groups by what they add to an output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.core.precision import half
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.solvers.quantisation_grid import Grid, fit

STEPS = 20  # exponents that are tried, from 0 to below 1
_LIMITS = tuple(1 - step / 20 for step in range(10))  # of a group's largest magnitude, down to 0.55
_LEAST = 1e-4  # mean magnitude of an input channel: smaller ones are no smaller for the scales


def awq_scales(inputs: InputStats, step: int) -> Tensor:
    """What the columns of weights are multiplied by before rounding [i], at one of the steps that are tried.

    The inputs' mean magnitudes to some power from 0 (plain rounding) to below 1; their geometric middle is 1 (Lin et
    al. 2023, arXiv:2306.00978, equation 5).
    """
    scales = inputs.absmean.clamp_min(_LEAST) ** (step / STEPS)
    return scales / (scales.max() * scales.min()).sqrt()


def awq_columns(weight: Tensor, inputs: InputStats, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """What the columns of a weight [o, i] are divided by before rounding and multiplied by afterwards [i].

    The inverse, as float16 has it, of those scales that change the outputs least, tr(Δ M Δᵀ) (equation 4). nearest:
    rounds a scaled weight.
    """
    best: Tensor | None = None
    least = float("inf")
    for step in range(STEPS):
        columns = half(1 / awq_scales(inputs, step), "the factors of its columns").float()
        change = nearest(weight / columns).mul_(columns).sub_(weight)
        error = float(inputs.output_error(change).sum())
        if best is None or error < least:
            best, least = columns, error
    assert best is not None
    return best


def scaled_inputs(inputs: InputStats, scales: Tensor) -> InputStats:
    """What is known of inputs once each is divided by its scale [i]."""
    hessian = inputs.hessian / scales / scales[:, None]
    channels = (inputs.mean / scales, inputs.absmean / scales, inputs.absmax / scales, inputs.square / scales.square())
    return InputStats(inputs.tokens, *channels, hessian)


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


def clipped(weight: Tensor, inputs: InputStats, whole: Grid, *, symmetric: bool) -> Grid:
    """A grid for a weight [o, i] that leaves out the ends of groups where that helps their row.

    whole: the grid that covers all of each group; of its bits and groups the other is, too.
    """
    group = whole.group
    groups = pad(weight.abs(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    largest, found, least = groups.amax(dim=-1), whole, torch.full_like(whole.scale, torch.inf)
    for limit in _LIMITS:
        ends = whole.spread(limit * largest, weight.shape[1])
        cut = weight.clamp(-ends, ends)
        grid = fit(cut, whole.bits, group, symmetric=symmetric, every_level=True)
        cost = group_errors(grid.nearest(weight).sub_(weight), inputs.hessian, group)
        found, least = _either(cost < least, grid, found), torch.minimum(cost, least)
    errors = (inputs.output_error(grid.nearest(weight) - weight)[:, None] for grid in (whole, found))
    with_all, without = errors
    return _either(without < with_all, found, whole)


def _either(first: Tensor, one: Grid, other: Grid) -> Grid:
    """One grid where `first` [o, g] or [o, 1] says so, else the other."""
    scale, zero = (torch.where(first, a, b) for a, b in ((one.scale, other.scale), (one.zero, other.zero)))
    return Grid(scale, zero, one.bits, one.group)
