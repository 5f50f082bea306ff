"""GPTQ: columns rounded one after another, each error undone as far as possible by the columns that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid

Order = Literal["columns", "activations", "groups"]
"""In which order columns are rounded; see `gptq`."""

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
    order: Order = "columns",
    exact: int = 0,
    kept: Tensor | None = None,
) -> Rounded:
    """Round weight [o, i] so that its outputs change as little as may be: tr(Δ M Δᵀ) for the inputs' Hessian M [i, i].

    Columns are rounded one after another; what each loses is spread over those still to come by the factor of the
    inverse Hessian (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

    fit: the grid of one group, given its columns as they are when the first of them is due [o, c], and its number.
    group: columns in each, the last may have fewer. damping: added to the Hessian's diagonal, as a share of its mean
    (see `inverse_factor`). order: from left to right ("columns"); the columns with the largest inputs first
    ("activations"), where groups stay neighbouring columns and their grids are those of the original weight ("static
    groups"), so that nothing but codes, scales and zeros has to be held; or the groups with the largest input first,
    and within each the largest first ("groups", group-aware reordering, Gafni et al. 2025, arXiv:2505.14638), where
    grids are found when a group is due. exact: how many columns at the end are not rounded. kept: bool [o, i - exact],
    the weights that are there; the others become zero, and what that loses is made up for like the rest.
    """
    columns = weight.shape[1] - exact
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)  # [i, o]: a column is contiguous
    groups = -(-columns // group)
    scale, zero = left.new_empty(groups, weight.shape[0]), left.new_empty(groups, weight.shape[0])
    top = [0] * groups  # the largest code of each

    def settle(number: int, part: Tensor) -> None:
        grid = fit(part.T, number)
        scale[number], zero[number], top[number] = grid.scale[:, 0], grid.zero[:, 0], 2**grid.bits - 1

    spans = [(first, min(first + group, columns)) for first in range(0, columns, group)]
    if order == "activations":
        for number, (first, last) in enumerate(spans):
            settle(number, left[first:last])
    places = _places(hessian.diagonal()[:columns], spans, order)  # which column is due when
    if order != "columns":
        moved = torch.tensor([*places, *range(columns, weight.shape[1])], device=left.device)
        left, hessian = left[moved], hessian[moved][:, moved]
    factor = inverse_factor(hessian, damping)
    pivots = factor.diagonal().tolist()
    codes = left.new_empty(columns, weight.shape[0])
    gone = None if kept is None else ~kept.T
    # Where grids are fixed beforehand, no group has to be up to date.
    sizes = [1] * columns if order == "activations" else _lengths(places, group)
    due = -1  # the group that was settled last
    for begin, end in _blocks(sizes):
        errors = left.new_empty(end - begin, weight.shape[0])
        for place in range(begin, end):
            column = places[place]
            number = column // group
            if order != "activations" and number != due:
                first, last = spans[number]
                settle(number, left[place : place + last - first])
                due = number
            code = torch.div(left[place], scale[number], out=codes[column])
            code.add_(zero[number]).round_().clamp_(0, top[number])
            if gone is not None:
                torch.where(gone[column], zero[number], code, out=code)
            error = torch.sub(code, zero[number], out=errors[place - begin]).mul_(scale[number])
            error.sub_(left[place]).div_(pivots[place])
            left[place + 1 : end].addr_(factor[place, place + 1 : end], error)
        if end < len(left):
            left[end:].addmm_(factor[begin:end, end:].T, errors)
    return Rounded(codes.T.to(torch.uint8).contiguous(), scale.T, zero.T, left[columns:].T)


def _places(inputs: Tensor, spans: Sequence[tuple[int, int]], order: Order) -> list[int]:
    """The columns in the order in which they are due; inputs: their mean squares [i]."""
    if order == "columns":
        return list(range(len(inputs)))
    if order == "activations":
        due: list[int] = inputs.argsort(descending=True, stable=True).tolist()
        return due
    largest = torch.stack([inputs[first:last].max() for first, last in spans])
    places: list[int] = []
    for number in largest.argsort(descending=True, stable=True).tolist():
        first, last = spans[number]
        own = inputs[first:last].argsort(descending=True, stable=True) + first
        places += own.tolist()
    return places


def _lengths(places: Sequence[int], group: int) -> list[int]:
    """How many columns each group has, in the order in which groups are due."""
    lengths: list[int] = []
    due = -1
    for column in places:
        if column // group != due:
            due = column // group
            lengths.append(0)
        lengths[-1] += 1
    return lengths


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Blocks of at most `_BLOCK` columns that hold whole groups of these sizes, or begin with one: a group's first
    column is due when all of the group is up to date.
    """
    begin = end = 0
    for size in sizes:
        if begin < end and end + size - begin > _BLOCK:
            yield begin, end
            begin = end
        end += size
        while end - begin > _BLOCK:
            yield begin, begin + _BLOCK
            begin += _BLOCK
    if begin < end:
        yield begin, end
