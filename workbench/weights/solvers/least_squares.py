"""Weights fitted to the outputs of other weights by least squares."""

from __future__ import annotations

import torch
from torch import Tensor


def refitted(weight: Tensor, hessian: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight [o, m] on the inputs `kept` int64 [m] whose outputs are closest to those of weight [o, i], float64.

    hessian: the mean of x xᵀ [i, i], to whose diagonal `damping` of its mean is added.
    """
    whole = damped(hessian, damping)
    refit: Tensor = torch.linalg.solve(whole[kept][:, kept], (weight.double() @ whole[:, kept]).T).T
    return refit


def damped(hessian: Tensor, damping: float) -> Tensor:
    """A Hessian [i, i] with `damping` of its diagonal's mean added to the diagonal, float64; never singular."""
    mean = hessian.double().diagonal().mean().clamp_min(1e-12)
    return hessian.double() + damping * mean * torch.eye(hessian.shape[0], dtype=torch.double, device=hessian.device)
