"""The square root of a second moment: in its coordinates, the error of a weight is the error of a layer's outputs."""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING = 1e-6  # of the mean of the diagonal: what float32 needs where inputs hardly vary in some direction


def root(moment: Tensor) -> Tensor:
    """The lower triangular L [i, i] with L Lᵀ = M for the second moment M [i, i], so that ‖ΔW L‖² = E‖ΔW x‖².

    A small multiple of the identity is added, ten times as much until M has a root: directions that calibration never
    showed still cost a little. With no calibration at all (an expert that no token chose) L is the identity.
    """
    size = moment.shape[0]
    exact = moment.double()
    mean = exact.diagonal().mean()
    eye = torch.eye(size, dtype=torch.float64, device=moment.device)
    if not mean > 0:
        return eye.float()
    damping = _DAMPING
    while True:
        factor, failed = torch.linalg.cholesky_ex(exact + damping * mean * eye)
        if not failed:
            lower: Tensor = factor.float()
            return lower
        damping *= 10


def solved(rows: Tensor, base: Tensor) -> Tensor:
    """rows [r, i] times the inverse of a lower triangular base [i, i]: out of its coordinates."""
    inverse: Tensor = torch.linalg.solve_triangular(base.double(), rows.double(), upper=False, left=False).float()
    return inverse
