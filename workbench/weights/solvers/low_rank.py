"""Weights as products of two thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.precision import checked
from workbench.weights.solvers.least_squares import damped
from workbench.weights.solvers.whitening import root, solved

_HELD = 1e-9  # of the mean of the diagonal, where inputs hardly vary in some direction


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product is the closest to weight [o, i] of all of that rank, at its dtype.

    The singular values are shared out evenly, so that both fit into 16 bits.
    """
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = values[:rank].sqrt()
    return in_precision(weight, root[:, None] * right[:rank], left[:, :rank] * root)


def whitened(weight: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product changes the outputs of weight [o, i] least of all of that rank, in the
    mean square over inputs of this second moment [i, i].
    """
    base = root(moment)
    down, up = truncated(weight.detach().float() @ base, rank)
    return in_precision(weight, solved(down, base), up)


def updated(weight: Tensor, down: Tensor, moment: Tensor) -> Tensor:
    """The up [o, r] that makes of x through `down` [r, i] what comes closest to the outputs of weight [o, i], in the
    mean square over inputs x of this second moment [i, i]: W M Dᵀ (D M Dᵀ)⁻¹.
    """
    seen = down.double() @ moment.double()  # [r, i]
    gram = damped(seen @ down.double().T, _HELD)
    up: Tensor = torch.linalg.solve(gram, seen @ weight.detach().double().T).T
    return checked(up.float(), weight.dtype, "its factors")


def row_weighted(weight: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product is the closest of that rank to weight [o, i] where the squared error of
    each row counts by rows [o], positive.
    """
    factor = (rows / rows.mean()).sqrt()[:, None]
    down, up = truncated(factor * weight.detach().float(), rank)
    return in_precision(weight, down, up / factor)


def in_precision(weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the precision of the weight that they stand for."""
    return checked(down, weight.dtype, "its factors"), checked(up, weight.dtype, "its factors")
