"""Which neurons hold up the condition of a matrix, and what makes up for those that go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.weights.solvers.least_squares import damped


def leverage(down: Tensor, squares: Tensor) -> Tensor:
    """How far each neuron holds up the condition of the matrix of all neurons' outputs, float64 [i], between 0 and 1.

    B [o, i] is `down` with each column at the size of its neuron's activation; a neuron's value is bᵀ (B Bᵀ + c I)⁻¹ b
    of its column b, c the mean eigenvalue of B Bᵀ. Leaving it out multiplies det(B Bᵀ + c I) by one minus that: what
    is small can go without the matrix losing a direction.
    """
    scaled = down.double() * squares.double().sqrt()
    gram = scaled @ scaled.T
    mean = gram.diagonal().mean().clamp_min(1e-30)
    solved = torch.linalg.solve(gram + mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), scaled)
    values: Tensor = (scaled * solved).sum(dim=0)
    return values


def tuned(down: Tensor, hessian: Tensor, kept: Tensor, damping: float) -> Tensor:
    """By how much each neuron that stays is multiplied so that the outputs are closest to those of all, float64 [m].

    The mask that minimises the mean square of W x - W_K diag(mask) x_K; `damping` of the mean diagonal holds it at 1.
    hessian: the mean of x xᵀ [i, i].
    """
    products = (down.double().T @ down.double()) * hessian.double()
    gram = products[kept][:, kept]
    missing = products[kept].sum(dim=1) - gram.sum(dim=1)
    mask: Tensor = 1 + torch.linalg.solve(damped(gram, damping), missing)
    return mask


def remaining(order: Sequence[int], sizes: Sequence[int], spare: Sequence[int], limit: int, coarse: float) -> list[int]:
    """Which blocks stay, ascending: those at the beginning of `order` go, the last never.

    They go while together they have at most the share `coarse` of what must go for the rest to take `limit` bytes, and
    for as long as those that stay could not take so few even without their `spare` bytes.
    """
    staying, gone = set(order), 0
    for index in order[:-1]:
        feasible = sum(sizes[other] - spare[other] for other in staying) <= limit
        if feasible and gone + sizes[index] > coarse * (sum(sizes) - limit):
            break
        staying.remove(index)
        gone += sizes[index]
    return sorted(staying)
