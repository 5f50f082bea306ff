"""The factor of the inverse Hessian by which columns make up for what others lost."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CalibrationFailed


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U [i, i] with UᵀU the inverse of the damped Hessian; float32, computed in float64.

    The Hessian is `hessian` plus `damping` times the mean of its diagonal: a channel that was never seen is rounded to
    nearest, and neither gives nor takes. Where that has no factor, damping is raised tenfold up to 1; then Raises
    CalibrationFailed. A Hessian of zeros (a layer that no token reached) counts as the identity.
    """
    size = float(hessian.diagonal().mean())
    if size == 0:
        return torch.eye(len(hessian), device=hessian.device)
    # U is the inverse of R where the Hessian is R Rᵀ with R upper triangular: a Cholesky factor from the other end.
    flipped = hessian.double().flip(0, 1)
    share = damping
    while True:
        damped = flipped.clone()
        damped.diagonal().add_(share * size)
        lower, broken = torch.linalg.cholesky_ex(damped)
        if not broken and bool(lower.isfinite().all()):
            break
        if share >= 1:
            raise CalibrationFailed(
                f"the Hessian of {len(hessian)} inputs has no Cholesky factor, not even damped by {share:g} of "
                "its mean: calibrate on more or other text"
            )
        share = min(10 * share, 1.0)
    root = lower.flip(0, 1)
    one = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, one, upper=True).float()
    return inverse
