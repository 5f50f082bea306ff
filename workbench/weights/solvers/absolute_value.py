"""Weights as signs times a matrix of low rank, block after block (Wang et al. 2024, arXiv:2410.23918)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.weights.layers import BitBlock

_SPARE = 16  # columns that the search for singular vectors takes along, and
_ROUNDS = 4  # how often it passes over the matrix


def scales(square: Tensor) -> Tensor:
    """By how much each column [i] of a weight counts: the root mean square of its input, nowhere below a thousandth of
    the mean, for what calibration did not show may still come.
    """
    size = square.sqrt()
    mean = size.mean()
    return size.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(size)


def decompose(weight: Tensor, scale: Tensor, rank: int, count: int) -> tuple[list[BitBlock], list[float]]:
    """At most `count` blocks whose sum comes ever closer to weight [o, i], columns counting by scale [i] (Wang et al.
    2024, algorithm 1), and the share of the weight's scaled squares that is left after each of them.

    A block is made of what the 16-bit numbers of those before it left over.
    """
    blocks, errors = [], []
    left = weight * scale
    whole = left.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(count):
        up, down = leading(left.abs(), rank)
        block = BitBlock.of(left >= 0, up, down / scale)
        left -= block.rows(0, weight.shape[0], torch.float32) * scale
        blocks.append(block)
        errors.append(float(left.square().sum() / whole))
    return blocks, errors


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up [o, r] and down [r, i] whose product is nearly the closest of that rank to matrix [o, i]: singular vectors by
    subspace iteration (Halko et al. 2011), always from the same start.
    """
    width = min(rank + _SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    share = values[:rank].sqrt()
    return basis @ left[:, :rank] * share, share[:, None] * right[:rank]
