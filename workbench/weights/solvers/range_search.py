"""The grid that suits its weights best of all with a step of some size and a zero somewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.weights.solvers.quantisation_grid import Grid, stored_scale

_NORM = 2.4


def searched(weight: Tensor, bits: int, group: int, ranges: int, *, symmetric: bool = False) -> Grid:
    """The grid that changes each group of weight [o, i] least of all, by the sum of |change| to the power 2.4.

    Tried are `ranges` steps, evenly up to that with which the levels span all the weights (and zero), each with every
    level as the zero; of symmetric grids only the middle one, up to the step that reaches the largest magnitude with
    the 2 ** (bits - 1) levels below zero (OWQ, xvyaward/owq, owq/quant.py, 03cfc99).
    """
    rows = pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))  # [o, g, c]; zeros cost nothing
    low, high = rows.amin(dim=-1).clamp_max_(0), rows.amax(dim=-1).clamp_min_(0)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    widest = torch.maximum(high, -low) / middle if symmetric else (high - low) / top
    scale, zero = stored_scale(widest), torch.full_like(widest, middle)
    least = torch.full_like(widest, torch.inf)
    for number in range(1, ranges + 1):
        tried = stored_scale(widest * (number / ranges))
        wholes = (rows / tried[..., None]).round_()
        for level in (middle,) if symmetric else range(top + 1):
            change = wholes.clamp(-level, top - level).mul_(tried[..., None]).sub_(rows)
            cost = change.abs_().pow_(_NORM).sum(dim=-1)
            better = cost < least
            least = torch.where(better, cost, least)
            scale, zero = torch.where(better, tried, scale), zero.masked_fill(better, level)
    return Grid(scale, zero, bits, group)
