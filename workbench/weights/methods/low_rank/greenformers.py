"""Greenformers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.solvers.low_rank import in_precision, truncated


@register
class Greenformers(Ranked):
    """Replace every linear layer by two thin ones, found by SVD or by a semi-nonnegative factorisation.

    The toolkit's automatic factorisation into an encoder and a decoder: a rank as a share of the largest one that saves
    anything, o i / (o + i), which is the budget here; and a solver. "svd" truncates, as `SVD` does, which without
    training the default model does not survive (perplexity 15 million at 0.8); "snmf" lets one factor have nonnegative
    numbers only (Ding et al. 2010), found by `iterations` of alternating updates, which is never closer than SVD and
    there to be compared. The toolkit's third solver, random factors, is a start for training, no compression of trained
    weights, and not offered. From a share of 1 on the weights stay as they are.
    """

    key = "greenformers"
    title = "Greenformers"
    paper = Paper(
        "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation",
        "Cahyawijaya 2021",
        "2108.10808",
    )
    claim = "low-rank layers by one call, with a choice of solvers"
    fidelity = Fidelity("as published")
    default_budget = 0.8

    solver: Literal["svd", "snmf"] = param(
        "svd",
        help="how the two factors are found",
        own="the toolkit asks for one; snmf is never closer (workbench-tiny at 0.8: KL 2.07 against 0.79)",
    )
    iterations: int = param(
        50,
        ge=1,
        le=1000,
        help="updates of the semi-nonnegative factorisation",
        own="the toolkit's number could not be read",
    )

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        rank = self.rank(linear)
        if not rank:
            return linear
        if self.solver == "svd":
            return LowRankLinear(*truncated(linear.weight, rank), linear.bias)
        return LowRankLinear(*semi_nonnegative(linear.weight, rank, self.iterations), linear.bias)


def semi_nonnegative(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """down [r, i], nonnegative, and up [o, r] whose product comes close to weight [o, i], at its dtype.

    Alternates least squares for `up` with the multiplicative update of `down` (Ding, Li and Jordan 2010, equations 10
    and 11), from a start that is always the same. The error never grows. What the toolkit calls the input's side is
    the nonnegative one.
    """
    whole = weight.detach().float()
    draw = torch.Generator().manual_seed(0)
    down = torch.rand(rank, whole.shape[1], generator=draw).to(whole) + 0.2
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        up = _least_squares(whole, down)
        pull, gram = up.T @ whole, up.T @ up  # [r, i], [r, r]
        above = pull.clamp_min(0) + (-gram).clamp_min(0) @ down
        below = (-pull).clamp_min(0) + gram.clamp_min(0) @ down
        down *= (above / below.clamp_min(tiny)).sqrt_()
    up = _least_squares(whole, down)
    share = (up.norm(dim=0) / down.norm(dim=1).clamp_min(tiny)).sqrt().clamp_min(1e-6)  # both fit into 16 bits
    return in_precision(weight, down * share[:, None], up / share)


def _least_squares(whole: Tensor, down: Tensor) -> Tensor:
    """The up [o, r] for which up @ down is closest to whole [o, i]."""
    wide = down.double()
    up: Tensor = (whole.double() @ wide.T @ torch.linalg.pinv(wide @ wide.T, hermitian=True)).float()
    return up
