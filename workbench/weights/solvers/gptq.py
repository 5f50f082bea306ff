"""GPTQ: columns rounded one after another, each error undone as far as possible by the columns that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid

_BLOCK = 128  # columns between two updates of everything that follows; within a block only the block is kept up to date


class Rounded(NamedTuple):
    """What `gptq` made of a weight [o, i] of which the last e columns were to stay exact.

    codes: uint8 [o, i - e]. scale, zero: [o, g], those of each group when its turn came. exact: float32 [o, e], which
    also took up what the others lost.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    exact: Tensor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    fit: Callable[[Tensor, int], Grid],
    group: int,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    exact: int = 0,
) -> Rounded:
    """Round weight [o, i] so that its outputs change as little as may be: tr(Δ M Δᵀ) for the inputs' Hessian M [i, i].

    Columns are rounded from left to right; what each loses is spread over those still to come by the factor of the
    inverse Hessian (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

    fit: the grid of one group, given its columns as they are when the first of them is due [o, c], and its number.
    group: columns in each, the last may have fewer. damping: added to the Hessian's diagonal, as a share of its mean
    (see `inverse_factor`). act_order: the columns with the largest inputs first; then the groups stay neighbouring
    columns and their grids are those of the original weight ("static groups"), so that nothing but codes, scales and
    zeros has to be held. exact: how many columns at the end are not rounded.
    """
    columns = weight.shape[1] - exact
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)  # [i, o]: a column is contiguous
    groups = -(-columns // group)
    scale, zero = left.new_empty(groups, weight.shape[0]), left.new_empty(groups, weight.shape[0])
    top = [0] * groups  # the largest code of each

    def settle(number: int) -> None:
        part = left[number * group : min((number + 1) * group, columns)]
        grid = fit(part.T, number)
        scale[number], zero[number], top[number] = grid.scale[:, 0], grid.zero[:, 0], 2**grid.bits - 1

    places = list(range(columns))  # which column is due when
    if act_order:
        for number in range(groups):
            settle(number)
        order = hessian.diagonal()[:columns].argsort(descending=True, stable=True)
        places = order.tolist()
        order = torch.cat([order, torch.arange(columns, weight.shape[1], device=order.device)])
        left, hessian = left[order], hessian[order][:, order]
    factor = inverse_factor(hessian, damping)
    pivots = factor.diagonal().tolist()
    codes = left.new_empty(columns, weight.shape[0])
    for begin, end in _blocks(columns, _BLOCK if act_order else group):
        errors = left.new_empty(end - begin, weight.shape[0])
        for place in range(begin, end):
            column = places[place]
            number = column // group
            if not act_order and column % group == 0:
                settle(number)
            code = torch.div(left[place], scale[number], out=codes[column])
            code.add_(zero[number]).round_().clamp_(0, top[number])
            error = torch.sub(code, zero[number], out=errors[place - begin]).mul_(scale[number])
            error.sub_(left[place]).div_(pivots[place])
            left[place + 1 : end].addr_(factor[place, place + 1 : end], error)
        if end < len(left):
            left[end:].addmm_(factor[begin:end, end:].T, errors)
    return Rounded(codes.T.to(torch.uint8).contiguous(), scale.T, zero.T, left[columns:].T)


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `_BLOCK` columns that hold whole groups, or lie within one: a group's first column is due when
    all of the group is up to date.
    """
    whole = max(_BLOCK // group, 1) * group
    for first in range(0, columns, whole):
        last = min(first + whole, columns)
        for begin in range(first, last, _BLOCK):
            yield begin, min(begin + _BLOCK, last)
