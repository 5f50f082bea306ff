"""Conjugate gradients for many small systems at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOLERANCE = 1e-6  # of the right-hand side's length


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """x with matrix(x) = target, row by row: target [..., d], `matrix` a symmetric positive map of each row.

    Rows that have arrived stay where they are; at most `steps` steps for the others.
    """
    solution = torch.zeros_like(target)
    residual, ahead = target.clone(), target.clone()
    size = residual.square().sum(-1, keepdim=True)
    enough = size * _TOLERANCE**2
    for _ in range(steps):
        going = size > enough
        if not going.any():
            break
        turned = matrix(ahead)
        step = torch.where(going, size / (ahead * turned).sum(-1, keepdim=True), 0.0)
        solution = solution + step * ahead
        residual = residual - step * turned
        smaller = residual.square().sum(-1, keepdim=True)
        ahead = residual + torch.where(going, smaller / size, 0.0) * ahead
        size = torch.where(going, smaller, size)
    return solution
