"""VPTQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.core.precision import half
from workbench.registry import Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import PackedLinear, Parts, VectorLinear, packed_nbytes, vector_nbytes
from workbench.weights.solvers.codebook import codebook, nearest
from workbench.weights.solvers.compensation import compensated
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid, fit, stored_scale

_BLOCK = 128  # columns between two updates of everything that follows
_OUTLIER_BITS: Literal[8] = 8


@register
class VPTQ(WeightMethod):
    """Replace vectors of weights by entries of a codebook, in turn, and let later columns make up for the error.

    Vectors are `vector_length` weights of neighbouring outputs in one column, so that a column is replaced at a time
    and every vector costs what its column's entry of the Hessian's diagonal says ("channel-independent", section 3.1,
    algorithm 1). The codebook is found by k-means weighted with that diagonal (section 3.2); a second one, where
    `residual_bits` is not 0, holds what is left of vectors after the first (section 3.3). Columns of which the most
    would be lost, their entry of the diagonal times their squares, are taken out first (section 3.4).

    Where this differs: weights of an output are divided by their root mean square first, which k-means counts in; the
    columns taken out are rounded to 8 bits, the paper gives them a codebook of their own; and nothing is trained on
    afterwards. Codebooks of the paper (up to 65,536 entries a layer) would be larger than the layers of small models:
    the default, 256 entries for vectors of 4, adds 0.05 bits to 2 at 576 x 576.
    """

    key = "vptq"
    title = "VPTQ"
    paper = Paper(
        "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
        "Liu et al. 2024",
        "2409.17066",
    )
    claim = "two bits a weight, near 16-bit quality on large models"
    needs_hessian: ClassVar[bool] = True

    vector_length: int = param(4, ge=2, le=16, unit="weights", help="how many share one index")
    index_bits: Literal[4, 6, 8, 10, 12] = param(8, help="bits of an index: the codebook has 2 to that power entries")
    residual_bits: Literal[0, 4, 6, 8, 10, 12] = param(0, help="bits of an index into the second codebook; 0: none")
    outliers: float = param(0.01, ge=0, le=0.2, help="share of the columns that are held at 8 bits")
    rounds: int = param(12, ge=1, le=100, help="of k-means")
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")
    seed: int = param(0, ge=0, le=2**31 - 1, help="where k-means begins")

    def nbytes(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        out = self._outliers(inputs)
        beside = packed_nbytes(outputs, out, _OUTLIER_BITS, out, zero_bytes=0) if out else 0
        places = (2 if inputs <= 2**15 else 4) * inputs if out else 0  # which part each column is in
        bits, entries = self._books(linear)
        return vector_nbytes(outputs, inputs - out, self.vector_length, bits, entries) + beside + places

    def _outliers(self, inputs: int) -> int:
        return min(int(self.outliers * inputs), inputs - 1)

    def _books(self, linear: nn.Linear) -> tuple[list[int], list[int]]:
        """Bits of the indices into each codebook, and its entries: never more than there are vectors."""
        outputs, inputs = linear.weight.shape
        vectors = -(-outputs // self.vector_length) * (inputs - self._outliers(inputs))
        bits: list[int] = [self.index_bits, *([self.residual_bits] if self.residual_bits else [])]
        return bits, [min(2**wide, vectors) for wide in bits]

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        assert inputs is not None
        weight, hessian = linear.weight.detach().float(), inputs.hessian
        costs = _diagonal(hessian)
        bits, entries = self._books(linear)
        taken = (costs * weight.square().sum(dim=0)).argsort(descending=True, stable=True)
        taken = taken[: self._outliers(weight.shape[1])].sort().values
        factor = inverse_factor(hessian, self.damping)
        made = vectors(weight, costs, factor, taken, self.vector_length, entries, rounds=self.rounds, seed=self.seed)
        indexed = VectorLinear(made.indices, made.books, made.scale, bits, None if taken.numel() else linear.bias)
        if not taken.numel():
            return indexed
        rest = _others(taken, weight.shape[1])
        beside = PackedLinear(made.codes, made.grid.scale, None, _OUTLIER_BITS, group=made.grid.group)
        return Parts([indexed, beside], [rest, taken], linear.in_features, linear.bias)


class Vectors(NamedTuple):
    """A weight [o, i] as indices int64 [o / v, i - e] into books [k, v], times scale [o]; e columns as codes [o, e]."""

    indices: list[Tensor]
    books: list[Tensor]
    scale: Tensor
    codes: Tensor
    grid: Grid


def vectors(
    weight: Tensor,
    costs: Tensor,
    factor: Tensor,
    taken: Tensor,
    length: int,
    entries: list[int],
    *,
    rounds: int = 12,
    seed: int = 0,
) -> Vectors:
    """Weight [o, i] as vectors of `length`, but for the columns `taken` int64 [e]; see VPTQ.

    costs: the Hessian's diagonal [i]. factor: its inverse's. entries: of each codebook.
    """
    outputs, columns = weight.shape
    rest = _others(taken, columns)
    scale = stored_scale(weight[:, rest].square().mean(dim=1).sqrt())
    spare = -outputs % length  # the last vectors are filled up with what costs nothing
    importance = pad(scale.square(), (0, spare)).view(-1, length)  # [p, v]
    divisor = pad(scale, (0, spare), value=1.0).view(-1, length)

    def split(column: Tensor) -> Tensor:
        """[..., o] to vectors [..., p, v]."""
        divided: Tensor = pad(column, (0, spare)).unflatten(-1, (-1, length)) / divisor
        return divided

    points = split(weight.T[rest]).flatten(0, 1)  # [(i - e) p, v]
    weights = (costs[rest][:, None, None] * importance).flatten(0, 1)
    books: list[Tensor] = []
    for number, count in enumerate(entries):
        book = half(codebook(points, weights, count, rounds=rounds, seed=seed + number), "its codebooks").float()
        books.append(book)
        if number + 1 < len(entries):
            points = points - book[nearest(weights * points, weights, book)[0]]
    lengths = [importance @ book.square().T for book in books]  # [p, k], the same for every column

    grid = fit(weight[:, taken], _OUTLIER_BITS, max(taken.numel(), 1), symmetric=True) if taken.numel() else _NONE
    codes = torch.empty(outputs, taken.numel(), dtype=torch.uint8, device=weight.device)
    indices = [torch.empty(importance.shape[0], rest.numel(), dtype=torch.int64, device=weight.device) for _ in books]
    places = {column: place for place, column in enumerate(rest.tolist())}
    apart = {column: place for place, column in enumerate(taken.tolist())}

    def replace(column: Tensor, number: int) -> Tensor:
        if number in apart:
            rounded = grid.codes(column[:, None])
            codes[:, apart[number]] = rounded[:, 0]
            return grid.dequantised(rounded)[:, 0]
        left = split(column)
        sum_ = torch.zeros_like(left)
        for book, squares, index in zip(books, lengths, indices, strict=True):
            best = torch.addmm(squares, importance * (left - sum_), book.T, alpha=-2).argmin(dim=1)
            index[:, places[number]] = best
            sum_ = sum_ + book[best]
        return sum_.flatten()[:outputs] * scale

    def prepare(_first: int, _part: Tensor) -> Callable[[Tensor, int], Tensor]:
        return replace

    compensated(weight, factor, prepare, _BLOCK)
    return Vectors(indices, books, scale, codes, grid)


_NONE = Grid(torch.empty(0, 0), torch.empty(0, 0), _OUTLIER_BITS, 1)


def _diagonal(hessian: Tensor) -> Tensor:
    """What each column costs [i]: the diagonal, and a little for columns that were never seen."""
    costs = hessian.diagonal().float()
    return costs + 1e-4 * costs.mean() if float(costs.sum()) > 0 else torch.ones_like(costs)


def _others(taken: Tensor, columns: int) -> Tensor:
    """The columns that are not taken, ascending."""
    return torch.ones(columns, dtype=torch.bool, device=taken.device).index_fill_(0, taken, False).nonzero()[:, 0]
