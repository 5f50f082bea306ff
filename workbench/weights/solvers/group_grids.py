"""Grids of one group of columns whose weights matter to different degrees, down to a single bit (SliM-LLM)."""

from __future__ import annotations

from torch import Tensor

from workbench.core.precision import half
from workbench.weights.solvers.quantisation_grid import Grid, fit_least, squares, stored_scale

_WIDE = (1.0, 1.03, 1.06, 1.1, *(1 - step / 25 for step in range(1, 13)))  # of a range
_NEAR = (1.0, *(1 + sign * step / 500 for sign in (1, -1) for step in range(1, 51)))
_NORM = 2.4


def binary(weight: Tensor, group: int) -> Grid:
    """The grid of one bit for each group of weight [o, i]: the mean plus and minus the mean distance from it."""
    rows = weight.float().unflatten(1, (-1, group))
    mean = rows.mean(dim=-1)
    distance = (rows - mean[..., None]).abs().mean(dim=-1)
    scale = stored_scale(2 * distance)
    return Grid(scale, half(0.5 - mean / scale, "its zeros").float(), 1, group)


def near_grid(weight: Tensor, bits: int) -> Grid:
    """The grid of one group [o, c] within a tenth of its range, whose |change| to the power 2.4 is least in sum.

    Section 3.3 of the paper parts the weights by their salience and then adds the errors of both parts with the same
    weight (slim-llm/utils/mixed_quantizer.py, lambda_salience 1): it comes to this.
    """
    if bits == 1:
        return binary(weight, weight.shape[1])
    return fit_least(
        weight, bits, weight.shape[1], _NEAR, lambda change: change.abs_().pow_(_NORM).sum(1, keepdim=True)
    )


def salient_grid(weight: Tensor, factor: Tensor, bits: int) -> Grid:
    """The grid of one group [o, c], from half its range to a tenth more than that, at which its salience suffers least.

    A weight's error counts by 1 / [H⁻¹] of its column, which makes of w² what removing the weight would cost. factor:
    the inverse Hessian's columns for this group [i, c].
    """
    if bits == 1:
        return binary(weight, weight.shape[1])
    roots = factor.square().sum(dim=0).rsqrt()
    return fit_least(weight, bits, weight.shape[1], _WIDE, lambda change: squares(change * roots, weight.shape[1]))
