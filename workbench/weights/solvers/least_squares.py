"""Weights fitted to the outputs of other weights by least squares."""

from __future__ import annotations

import torch
from torch import Tensor


def refitted(weight: Tensor, moment: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight [o, m] on the inputs `kept` int64 [m] whose outputs are closest to those of weight [o, i], float64.

    moment: the mean of x xᵀ [i, i], to whose diagonal `damping` of its mean is added.
    """
    hessian = damped(moment, damping)
    return torch.linalg.solve(hessian[kept][:, kept], (weight.double() @ hessian[:, kept]).T).T


def damped(moment: Tensor, damping: float) -> Tensor:
    """A second moment [i, i] with `damping` of its diagonal's mean added to the diagonal, float64; never singular."""
    mean = moment.double().diagonal().mean().clamp_min(1e-12)
    return moment.double() + damping * mean * torch.eye(moment.shape[0], dtype=torch.double, device=moment.device)
