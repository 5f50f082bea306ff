"""EasyQuant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import OutliersLinear, Parts, outliers_nbytes
from workbench.weights.solvers.quantisation_grid import Grid, fit, stored_scale

_FIRST_STEP, _LAST_STEP = 0.05, 0.003  # of a range at a time, as a share of it


@register
class EasyQuant(Quantiser):
    """Keep the few weights beyond n sigma at 16 bits, and fit the range of the others by gradient, without any data.

    Outliers are the weights further than `sigma` standard deviations from their layer's mean (section 3.1), at most the
    share `outliers`; codes stand for zero there, so that what is held for them is their value. The range of each
    output's rest, or of each group of its columns, then descends the gradient of its squared error, in which the codes
    count as constants (section 3.2): with q the whole number of a weight w at scale s, that of s is 2 Σ q (s q - w). Of
    all ranges on the way, the one with the smallest error stays, so that none is worse than plain rounding of the rest.
    The paper takes the steps of Adam; here they are of the form of its first: of a fixed share of the range, in the
    direction of the gradient's sign, ever smaller.
    """

    key = "easyquant"
    title = "EasyQuant"
    paper = Paper("EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs", "Tang et al. 2023", "2403.02775")
    claim = "nearly lossless at 4 bits without any data, ten times faster than methods that calibrate"

    fidelity = Fidelity("deviates", "ranges are fitted by steps of the gradient's sign, not by Adam")
    presets = (
        Preset(
            "paper",
            "section 3 as reported of it: outliers below 1 %, 4 bits, a range for each row, from minus to plus",
            outliers=0.01,
            bits=4,
            group_size=0,
            symmetric=True,
        ),
    )

    group_size: int = param(
        0, ge=0, le=8192, multiple_of=8, unit="columns", help="how many columns share a scale; 0: all of an output's"
    )
    symmetric: bool = param(True, help="levels from minus to plus the largest magnitude, without a zero of their own")
    sigma: float = param(
        3.0,
        gt=0,
        le=20,
        help="standard deviations from the layer's mean beyond which weights are kept",
        own="the paper's n could not be read; of normal weights three are beyond in a thousand",
    )
    outliers: float = param(0.01, ge=0, le=0.1, help="share of a layer's weights that are kept, at most")
    steps: int = param(
        50, ge=0, le=1000, help="by which the ranges are fitted", own="the paper's number could not be read"
    )

    def group(self, linear: nn.Linear) -> int:
        return min(self.group_size or linear.in_features, linear.in_features)

    def nbytes(self, linear: nn.Linear) -> int:
        count = int(self.chosen(linear.weight.detach()).sum())
        beside = outliers_nbytes(linear.out_features, linear.in_features, count) if count else 0
        return super().nbytes(linear) + beside

    def chosen(self, weight: Tensor) -> Tensor:
        """Which of weight [o, i] are outliers, bool."""
        return outliers(weight, self.sigma, int(self.outliers * weight.numel()))

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        weight = linear.weight.detach()
        kept = self.chosen(weight)
        rest = weight.float().masked_fill(kept, 0)
        grid = fit(rest, self.bits, self.group(linear), symmetric=self.symmetric, every_level=True)
        grid = fitted(rest, grid, self.steps)
        codes = grid.codes(rest)
        if not kept.any():
            return self.packed(codes, grid, linear.bias)
        parts = [self.packed(codes, grid, None), OutliersLinear(weight, kept)]
        return Parts(parts, [None, None], linear.in_features, linear.bias)


def outliers(weight: Tensor, sigma: float, most: int) -> Tensor:
    """Which of weight [o, i] lie further than `sigma` standard deviations from the mean of all, bool; at most `most`
    of them, the furthest.
    """
    away = (weight.float() - weight.float().mean()).abs()
    beyond = away > sigma * weight.float().std(correction=0)
    if int(beyond.sum()) <= most:
        return beyond
    furthest = away.flatten().topk(most).indices
    return torch.zeros_like(beyond).flatten().index_fill_(0, furthest, True).view_as(beyond)


def fitted(weight: Tensor, grid: Grid, steps: int) -> Grid:
    """The grid with the scale of each group fitted to weight [o, i] by gradient; nowhere worse than it was."""
    groups = pad(weight.float(), (0, -weight.shape[1] % grid.group)).unflatten(1, (-1, grid.group))  # [o, g, c]
    lowest, highest = -grid.zero[..., None], 2**grid.bits - 1 - grid.zero[..., None]
    scale, best = grid.scale, grid.scale
    least = torch.full_like(scale, torch.inf)
    for number in range(steps + 1):
        now = stored_scale(scale)
        wholes = (groups / now[..., None]).round_().clamp_(lowest, highest)
        off = wholes.mul(now[..., None]).sub_(groups)
        error = off.square().sum(dim=-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, now, best)
        share = _FIRST_STEP * (_LAST_STEP / _FIRST_STEP) ** (number / max(steps, 1))
        scale = scale * (1 - share * off.mul_(wholes).sum(dim=-1).sign())
    return grid._replace(scale=best)
