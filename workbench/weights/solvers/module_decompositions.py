"""Decompositions of what stands inside a module: neurons kept and refitted, values mixed, channel pairs kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.weights.calibration.hessian import InputStats
from workbench.weights.solvers.whitening import root


def leverage(moment: Tensor, ridge: float) -> Tensor:
    """The ridge leverage of each neuron [i] in the correlation [i, i]: the diagonal of C (C + λ I)⁻¹."""
    exact = moment.double()
    mean = exact.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(moment[0])
    damped = exact + ridge * mean * torch.eye(len(exact), dtype=torch.float64, device=exact.device)
    return (1 - ridge * mean * torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()).float()


def nystrom(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The weight [o, m] that makes of the kept inputs what comes closest to the outputs of weight [o, i]."""
    if not moment.diagonal().sum() > 0:
        return weight[:, kept]
    base = root(moment[kept][:, kept]).double()
    pull = weight.double() @ moment[:, kept].double()  # [o, m]
    return torch.cholesky_solve(pull.T, base).T.float()


def value_moment(rows: Tensor, bias: Tensor, inputs: InputStats) -> Tensor:
    """The mean of v vᵀ [d, d] for values v = rows x + bias, rows [d, i]."""
    mean = torch.outer(rows @ inputs.mean, bias)
    return rows @ inputs.hessian @ rows.T + mean + mean.T + torch.outer(bias, bias)


def mixtures(outputs: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrix A [r, d] and outputs [o, r] in place of outputs [o, d], for which outputs (A v) comes closest to
    outputs v in the mean square over values with this second moment [d, d].
    """
    base = root(moment).double()
    seen = outputs.double() @ base  # what white values give
    _, basis = torch.linalg.eigh(seen.T @ seen)
    chosen = basis[:, -rank:].flip(1)  # [d, r]
    mixing = torch.linalg.solve_triangular(base, chosen.T, upper=False, left=False)
    return mixing.float(), (seen @ chosen).float()


def moment_of(layer: nn.Module, inputs: InputStats) -> Tensor:
    """The mean square of each output of a linear layer, float32 [o]."""
    assert isinstance(layer, nn.Linear)
    rows = layer.weight.detach().float()
    bias = torch.zeros_like(rows[:, 0]) if layer.bias is None else layer.bias.detach().float()
    products: Tensor = ((rows @ inputs.hessian) * rows).sum(dim=1)
    return products + 2 * bias * (rows @ inputs.mean) + bias.square()


def pair_scores(queries: Tensor, keys: Tensor, heads: int, groups: int) -> Tensor:
    """How much each pair of channels of a KV head carries of the scores, float32 [heads, d / 2].

    queries: the mean square of each channel of all query heads [heads * groups * d]; keys: of all KV heads [heads * d].
    The squares of two channels that are turned together add up to the same at every position; a pair's score is the
    product of its root mean squares in keys and in queries, those of a KV head's query heads together.
    """
    of_queries = queries.view(heads, groups, 2, -1).sum(dim=(1, 2))  # [heads, d / 2]
    of_keys = keys.view(heads, 2, -1).sum(dim=1)
    return (of_queries * of_keys).clamp_min(0).sqrt()
