"""Vectors of a weight replaced by entries of codebooks, column after column (VPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.core.precision import half
from workbench.weights.solvers.codebook import codebook
from workbench.weights.solvers.compensation import compensated
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid, fit, stored_scale

_BLOCK = 128  # columns between two updates of everything that follows
APART_BITS: Literal[8] = 8  # of columns that are in no codebook
_NONE = Grid(torch.empty(0, 0), torch.empty(0, 0), APART_BITS, 1)


class Vectors(NamedTuple):
    """A weight [o, i] as indices int64 [o / v, i - e] into books [k, v], times scale [o]; e columns as codes [o, e]."""

    indices: list[Tensor]
    books: list[Tensor]
    scale: Tensor
    codes: Tensor
    grid: Grid


def vectors(
    weight: Tensor,
    hessian: Tensor,
    apart: Tensor,
    length: int,
    entries: Sequence[int],
    *,
    scaled: bool = True,
    permuted: bool = True,
    damping: float = 0.01,
    rounds: int = 12,
    seed: int = 0,
) -> Vectors:
    """Weight [o, i] as vectors of `length` neighbouring outputs of a column, but for the columns `apart` int64 [e].

    Each column takes the nearest entries, and those to come make up for it as the Hessian [i, i] says. entries: of each
    codebook. The first is found for the weights themselves; the next for what was left of each column when its turn
    came, in a pass with those before it (Liu et al. 2024, arXiv:2409.17066, sections 3.2 and 3.3). scaled: outputs are
    divided by their root mean square. permuted: the columns with the largest inputs come first.
    """
    made = _Columns(weight, hessian, apart, length, scaled=scaled)
    order = made.costs.argsort(descending=True, stable=True) if permuted else torch.arange(weight.shape[1])
    order = order.to(weight.device)
    factor = inverse_factor(hessian[order][:, order], damping)
    points = made.split(weight.T[made.rest])  # [i - e, p, v]
    for number, count in enumerate(entries):
        made.learn(points, count, rounds, seed + number)
        if number + 1 < len(entries):
            points = made.run(weight, factor, order)
    made.run(weight, factor, order)
    return Vectors(made.indices, made.books, made.scale, made.codes, made.grid)


class _Columns:
    """The columns of one weight on their way into codebooks."""

    def __init__(self, weight: Tensor, hessian: Tensor, apart: Tensor, length: int, *, scaled: bool) -> None:
        self.outputs, columns = weight.shape
        self.rest = others(apart, columns)
        self.costs = column_costs(hessian)
        size = weight[:, self.rest].square().mean(dim=1).sqrt()
        self.scale = stored_scale(size if scaled else torch.ones_like(size))
        self._spare = -self.outputs % length  # the last vectors are filled up with what costs nothing
        self._divisor = pad(self.scale, (0, self._spare), value=1.0).view(-1, length)
        self._importance = pad(self.scale.square(), (0, self._spare)).view(-1, length)  # [p, v]
        self.books: list[Tensor] = []
        self._squares: list[Tensor] = []  # [p, k] of each book, the same for every column
        self.indices: list[Tensor] = []
        self.grid = fit(weight[:, apart], APART_BITS, apart.numel(), symmetric=True) if apart.numel() else _NONE
        self.codes = torch.empty(self.outputs, apart.numel(), dtype=torch.uint8, device=weight.device)
        self._places = {column: place for place, column in enumerate(self.rest.tolist())}
        self._apart = {column: place for place, column in enumerate(apart.tolist())}

    def split(self, columns: Tensor) -> Tensor:
        """[..., o] to vectors [..., p, v]."""
        length = self._divisor.shape[1]
        divided: Tensor = pad(columns, (0, self._spare)).unflatten(-1, (-1, length)) / self._divisor
        return divided

    def learn(self, points: Tensor, count: int, rounds: int, seed: int) -> None:
        """Add a book of so many entries for vectors [i - e, p, v]."""
        weights = self.costs[self.rest][:, None, None] * self._importance
        book = codebook(points.flatten(0, 1), weights.flatten(0, 1), count, rounds=rounds, seed=seed)
        self.books.append(half(book, "its codebooks").float())
        self._squares.append(self._importance @ self.books[-1].square().T)

    def run(self, weight: Tensor, factor: Tensor, order: Tensor) -> Tensor:
        """Replace all columns in this order; what was left of each vector when its turn came, [i - e, p, v]."""
        shape = (len(self._importance), len(self.rest))
        self.indices = [torch.empty(shape, dtype=torch.int64, device=weight.device) for _ in self.books]
        left = weight.new_empty(len(self.rest), *self._importance.shape)
        numbers = order.tolist()

        def prepare(_first: int, _part: Tensor) -> Callable[[Tensor, int], Tensor]:
            return lambda column, place: self._replaced(column, numbers[place], left)

        compensated(weight[:, order], factor, prepare, _BLOCK)
        return left

    def _replaced(self, column: Tensor, number: int, left: Tensor) -> Tensor:
        if number in self._apart:
            rounded = self.grid.codes(column[:, None])
            self.codes[:, self._apart[number]] = rounded[:, 0]
            return self.grid.dequantised(rounded)[:, 0]
        place = self._places[number]
        rest = whole = self.split(column)
        for book, squares, index in zip(self.books, self._squares, self.indices, strict=True):
            best = torch.addmm(squares, self._importance * rest, book.T, alpha=-2).argmin(dim=1)
            index[:, place] = best
            rest = rest - book[best]
        left[place] = rest
        return (whole - rest).flatten()[: self.outputs] * self.scale


def column_costs(hessian: Tensor) -> Tensor:
    """What each column costs [i]: the diagonal, and a little for columns that were never seen."""
    costs = hessian.diagonal().float()
    return costs + 1e-4 * costs.mean() if float(costs.sum()) > 0 else torch.ones_like(costs)


def others(apart: Tensor, columns: int) -> Tensor:
    """The columns that are not apart, ascending."""
    return torch.ones(columns, dtype=torch.bool, device=apart.device).index_fill_(0, apart, False).nonzero()[:, 0]
