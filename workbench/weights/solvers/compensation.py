"""Columns replaced one after another by something smaller, while those that come later make up for what each one lost.

For whatever is no grid of levels; `gptq` does the same for grids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Replacing = Callable[[Tensor, int], Tensor]
"""What becomes of a column [o] of this number, [o]."""


def removal_cost(weight: Tensor, pivots: Tensor) -> Tensor:
    """What leaving out each weight [o, c] adds to the outputs' squared error once columns to its right make up for it.

    w² over the square of its column's pivot [c]: of the diagonal of the factor from `inverse_factor`, whose square is
    the entry of H⁻¹ once all columns to the left are done. Papers write w² / [H⁻¹]²_jj for it (SparseGPT, PB-LLM,
    SliM-LLM), as if H⁻¹ were the inverse itself; their published codes have its factor there.
    """
    return (weight / pivots).square()


def compensated(weight: Tensor, factor: Tensor, prepare: Callable[[int, Tensor], Replacing], block: int) -> Tensor:
    """What becomes of a weight [o, i] when its columns are replaced in turn, float32.

    After each column, those to its right take what brings the layer's outputs back closest to the original's (Frantar
    et al. 2022, arXiv:2210.17323, equations 2 and 3). factor: the inverse Hessian's, from `inverse_factor`. prepare:
    called at every `block` columns with the number of the first and the columns as they have become by then [o, c]; it
    says what becomes of each. What follows the block is changed once it is done, all together.
    """
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)  # [i, o]: a column is contiguous
    columns = left.shape[0]
    made = torch.empty_like(left)
    pivots = factor.diagonal().tolist()
    for first in range(0, columns, block):
        last = min(first + block, columns)
        replacing = prepare(first, left[first:last].T)
        errors = left.new_empty(last - first, left.shape[1])
        for column in range(first, last):
            made[column] = replacing(left[column], column)
            error = torch.sub(left[column], made[column], out=errors[column - first]).div_(pivots[column])
            left[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return made.T.contiguous()
