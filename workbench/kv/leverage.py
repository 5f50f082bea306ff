"""Leverage scores: how much a row of a matrix is needed to span its columns' space."""

from __future__ import annotations

import torch
from torch import Tensor


def leverage(rows: Tensor, sketch: int, ridge: float) -> Tensor:
    """The leverage of each of rows [k, n, d] in a random sketch of `sketch` dimensions, about their mean.

    diag(X (XᵀX + ridge)⁻¹ Xᵀ) for X = (rows - mean) · Φ with Gaussian Φ, the same one every time: float32 [k, n].
    """
    generator = torch.Generator().manual_seed(0)
    width = rows.shape[-1]
    turn = torch.randn(rows.shape[0], width, sketch, generator=generator).to(rows.device) / sketch**0.5
    x = (rows.float() - rows.float().mean(dim=1, keepdim=True)) @ turn
    gram = x.mT @ x + ridge * torch.eye(sketch, device=x.device)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x.mT, upper=False)  # [k, sketch, n]
    found: Tensor = half.square().sum(dim=1)
    return found


def standardised(scores: Tensor) -> Tensor:
    """Scores with mean 0 and standard deviation 1 over all heads and tokens."""
    return (scores - scores.mean()) / scores.std().clamp_min(1e-6)
