"""Codes of a few bits out of codes of eight, and the grids that they stand on (Huang et al. 2025, arXiv:2502.01199)."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.weights.solvers.quantisation_grid import Grid

MASTER = 8  # bits of the codes that all others come from


def rounded(codes: Tensor, bits: int, *, symmetric: bool = False) -> Tensor:
    """8-bit codes rounded to `bits` bits: the leading ones; of symmetric grids the nearest multiple of 2 ** (8 - bits),
    halves up, within the range.
    """
    below = MASTER - bits
    if not symmetric or not below:
        return codes >> below
    return (codes.to(torch.int16).add_(1 << below - 1) >> below).clamp_(max=2**bits - 1).to(torch.uint8)


def coarser(grid: Grid, bits: int, *, symmetric: bool = False) -> Grid:
    """The grid of the codes rounded to `bits` bits. Its zeros have fractions, of at most 7 bits: float16 holds them."""
    factor = 2 ** (grid.bits - bits)
    middle = 0.0 if symmetric else (factor - 1) / 2
    return Grid(grid.scale * factor, (grid.zero - middle) / factor, bits, grid.group)
