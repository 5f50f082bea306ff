"""GPTQ: columns rounded one after another, each error undone as far as possible by the columns that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.errors import CalibrationFailed
from workbench.registry import Paper, param, register
from workbench.weights.calibration.statistics import InputStats
from workbench.weights.layers import PackedLinear
from workbench.weights.quantiser import Quantiser
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
    moment: Tensor,
    fit: Callable[[Tensor, int], Grid],
    group: int,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    exact: int = 0,
) -> Rounded:
    """Round weight [o, i] so that its outputs change as little as may be: tr(Δ M Δᵀ) for the inputs' moment M [i, i].

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
        order = moment.diagonal()[:columns].argsort(descending=True, stable=True)
        places = order.tolist()
        order = torch.cat([order, torch.arange(columns, weight.shape[1], device=order.device)])
        left, moment = left[order], moment[order][:, order]
    factor = inverse_factor(moment, damping)
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


def inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper triangular U [i, i] with UᵀU the inverse of the damped Hessian; float32, computed in float64.

    The Hessian is `moment` plus `damping` times the mean of its diagonal: a channel that was never seen is rounded to
    nearest, and neither gives nor takes. Where that has no factor, damping is raised tenfold up to 1; then Raises
    CalibrationFailed. A moment of zeros (a layer that no token reached) counts as the identity.
    """
    size = float(moment.diagonal().mean())
    if size == 0:
        return torch.eye(len(moment), device=moment.device)
    # U is the inverse of R where the Hessian is R Rᵀ with R upper triangular: a Cholesky factor from the other end.
    flipped = moment.double().flip(0, 1)
    share = damping
    while True:
        damped = flipped.clone()
        damped.diagonal().add_(share * size)
        lower, broken = torch.linalg.cholesky_ex(damped)
        if not broken and bool(lower.isfinite().all()):
            break
        if share >= 1:
            raise CalibrationFailed(
                f"the second moment of {len(moment)} inputs has no Cholesky factor, not even damped by {share:g} of "
                "its mean: calibrate on more or other text"
            )
        share = min(10 * share, 1.0)
    root = lower.flip(0, 1)
    one = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, one, upper=True).float()


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `_BLOCK` columns that hold whole groups, or lie within one: a group's first column is due when
    all of the group is up to date.
    """
    whole = max(_BLOCK // group, 1) * group
    for first in range(0, columns, whole):
        last = min(first + whole, columns)
        for begin in range(first, last, _BLOCK):
            yield begin, min(begin + _BLOCK, last)


@register
class GPTQ(Quantiser):
    """Round the columns of a weight in turn, and let those still to come make up for what each loses.

    Each layer is solved by itself on the second moment of its inputs; see `gptq` for the order of columns and `rtn` for
    the grid. The moments are those of the uncompressed model, gathered once for every setting, where the paper takes
    them anew behind the blocks that it has compressed already.
    """

    key = "gptq"
    title = "GPTQ"
    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        "Frantar et al. 2022",
        "2210.17323",
    )
    claim = "175 billion parameters at 3 or 4 bits in four GPU hours, with negligible loss"
    needs_moment = True

    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")
    act_order: bool = param(False, help="round the columns with the largest inputs first, on grids fixed beforehand")

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> PackedLinear:
        assert inputs is not None
        weight, group = linear.weight.detach(), self.group(linear)
        done = gptq(
            weight,
            inputs.second_moment,
            lambda part, _: self.grid(part),
            group,
            damping=self.damping,
            act_order=self.act_order,
        )
        return self.packed(done.codes, Grid(done.scale, done.zero, self.bits, group), linear.bias)
