"""BitStack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import BitBlock, BitBlocksLinear, bit_block_nbytes
from workbench.weights.solvers.greedy_allocation import Size, growth_order, sizes_within

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE = 16  # columns that the search for singular vectors takes along, and
_ROUNDS = 4  # how often it passes over the matrix


@register
class BitStack(WeightMethod):
    """Cut every weight into blocks of about one bit a weight, and load as many of all layers' as the budget holds.

    A weight, its columns scaled by the root mean square of their inputs, is written as its signs times the best
    rank-`rank` matrix of its magnitudes (absolute value decomposition); what is left over is written so again, `blocks`
    times. Scales go into the low-rank part and cost nothing. Blocks of all layers are then put in one order, and a
    budget takes a beginning of it: at every size, the smaller ones lie inside. The stack is made once and stays in the
    session, outside of what a run counts as weights; another budget only loads other blocks.

    The paper orders blocks by the perplexity of the model with and without them, which takes as many passes over text
    as there are blocks. Here it is the loss of each layer's scaled weight, relative to that weight, per byte: next is
    the block that lowers it most. At least one block of each layer is loaded. The rank is lower in small layers, so
    that magnitudes take at most an eighth of the bytes of signs, as with the paper's 16 in matrices of 4096 by 4096
    (a wider one would cost the default model more than it gives). From a share of 1 on the weights stay as they are.
    """

    key = "bitstack"
    title = "BitStack"
    paper = Paper(
        "BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments",
        "Wang et al. 2024",
        "2410.23918",
    )
    claim = "matches or beats GPTQ and AWQ at any size, to the megabyte, without compressing again"
    default_budget = 0.3
    needs_inputs: ClassVar[bool] = True
    every_size: ClassVar[bool] = True

    rank: int = param(16, ge=1, le=128, help="most singular vectors of the magnitudes in a block")
    blocks: int = param(8, ge=1, le=16, help="most blocks of a layer")

    def nbytes(self, linear: nn.Linear) -> int:
        return self._count(linear) * self._block(linear)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        full = sum(map(self.full_nbytes, linears.values()))
        smallest, all_blocks = sum(map(self._block, linears.values())), sum(map(self.nbytes, linears.values()))
        limit = self._limit(full)
        return full if limit >= full else max(smallest, min(limit, all_blocks))

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        full = sum(map(self.full_nbytes, linears.values()))
        limit = self._limit(full)
        if limit >= full:
            return
        stack = study.once(self.parameter_key(), lambda: self._stack(linears, study, progress))
        loaded = sizes_within(stack.sizes, stack.order, limit)
        for name, linear in linears.items():
            twin.set_submodule(name, BitBlocksLinear(stack.blocks[name][: loaded[name] + 1], linear.bias))

    def _stack(self, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress) -> _Stack:
        blocks: dict[str, list[BitBlock]] = {}
        sizes: dict[str, list[Size]] = {}
        for _, inputs in study.inputs(hessians=False, progress=progress):
            for name in (name for name in linears if name in inputs):
                progress.update(f"compressing by {self.key}", len(blocks), len(linears))
                linear = linears[name]
                weight, scale = linear.weight.detach().float(), scales(inputs[name].square)
                with self.naming(name):
                    blocks[name], errors = decompose(weight, scale, self._rank(linear), self._count(linear))
                size = self._block(linear)
                sizes[name] = [Size(size * (number + 1), error) for number, error in enumerate(errors)]
        progress.update(f"compressing by {self.key}", len(linears), len(linears))
        sizes = {name: sizes[name] for name in linears}
        return _Stack(blocks, sizes, growth_order(sizes))

    def _limit(self, full: int) -> int:
        assert self.effective_budget is not None
        limit = self.effective_budget.nbytes(full)
        return full if limit is None else limit  # a budget in tokens, which is refused

    def _rank(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        return max(min(self.rank, outputs * inputs // (128 * (outputs + inputs))), 1)

    def _block(self, linear: nn.Linear) -> int:
        return bit_block_nbytes(linear.out_features, linear.in_features, self._rank(linear))

    def _count(self, linear: nn.Linear) -> int:
        return max(min(self.blocks, self.full_nbytes(linear) // self._block(linear)), 1)


class _Stack(NamedTuple):
    """All blocks of all layers, and in which order they are loaded."""

    blocks: dict[str, list[BitBlock]]
    sizes: dict[str, list[Size]]
    order: list[str]


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
