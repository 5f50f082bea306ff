"""BitStack."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from torch import nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.step_losses import step_losses
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import BitBlock, BitBlocksLinear, bit_block_nbytes
from workbench.weights.solvers.absolute_value import decompose, scales
from workbench.weights.solvers.greedy_allocation import Size, level_order, sizes_within

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 256  # of each text whose perplexity orders blocks
_SCRIPT = "xinghaow99/BitStack, scripts/decompose.sh and bitstack/main.py, 9f333d6"


@register
class BitStack(WeightMethod):
    """Cut every weight into blocks of about one bit a weight, and load as many of all layers' as the budget holds.

    A weight, its columns scaled by the root mean square of their inputs, is written as its signs times the best
    rank-`rank` matrix of its magnitudes (absolute value decomposition); what is left over is written so again, `blocks`
    times. Scales go into the low-rank part and cost nothing. Blocks of all layers are then put in one order, and a
    budget takes a beginning of it: at every size, the smaller ones lie inside. The stack is made once and stays in the
    session, outside of what a run counts as weights; another budget only loads other blocks.

    Every layer has n blocks before any gets another; among those that are the next to get one, the order is that of the
    perplexity of the model with this block of this layer, all others having n. That reads texts as many
    times as there are blocks. By default the order within a round is that of the error of the layer's scaled weight,
    relative to that weight, which the block takes away. At least one block of each layer is loaded.

    The authors' rank is 16. In small layers that costs more than it gives: the default is the highest, up to 16, with
    which magnitudes take at most an eighth of the bytes of signs, as 16 in matrices of 4096 by 4096 do. Blocks beyond
    what the weight itself takes are not made. From a share of 1 on the weights stay as they are.
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

    fidelity = Fidelity("deviates", "blocks of a round are ordered by layers' errors unless order='perplexity'")
    presets = (Preset("script", _SCRIPT, rank=16, blocks=16, order="perplexity"),)

    rank: int = param(
        0,
        ge=0,
        le=128,
        help="singular vectors of the magnitudes in a block; 0: by the layer's size",
        own="16 take a larger share of small layers: divergence at 0.3 on workbench-tiny 1.08, as it is here 0.32",
    )
    blocks: int = param(16, ge=1, le=16, help="most blocks of a layer")
    order: Literal["error", "perplexity"] = param(
        "error",
        help="which layer gets its next block first",
        own="perplexity reads texts once for each block: 240 seconds of workbench-tiny on a CPU, not 5. Divergence "
        "there at 0.4, 0.3 and 0.2: 0.20, 0.29 and 0.73; by errors 0.20, 0.32 and 0.77",
    )
    texts: int = param(
        4,
        ge=1,
        le=64,
        help="calibration texts whose perplexity is measured",
        own="the authors' 32 of 2,048 tokens would take hours without a GPU",
    )

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
        blocks = {name: blocks[name] for name in linears}
        if self.order == "error":
            after = {name: [-a.error + b.error for a, b in pairwise(own)] for name, own in sizes.items()}
        else:
            made = {name: [BitBlocksLinear(own[: n + 1]) for n in range(len(own))] for name, own in blocks.items()}
            after = step_losses(study.model, study.ids[: self.texts, :_TOKENS], made, progress, "ordering blocks")
        return _Stack(blocks, sizes, level_order(after))

    def _limit(self, full: int) -> int:
        assert self.effective_budget is not None
        limit = self.effective_budget.nbytes(full)
        return full if limit is None else limit  # a budget in tokens, which is refused

    def _rank(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        if self.rank:
            return min(self.rank, outputs, inputs)
        return max(min(16, outputs * inputs // (128 * (outputs + inputs))), 1)

    def _block(self, linear: nn.Linear) -> int:
        return bit_block_nbytes(linear.out_features, linear.in_features, self._rank(linear))

    def _count(self, linear: nn.Linear) -> int:
        return max(min(self.blocks, self.full_nbytes(linear) // self._block(linear)), 1)


class _Stack(NamedTuple):
    """All blocks of all layers, and in which order they are loaded."""

    blocks: dict[str, list[BitBlock]]
    sizes: dict[str, list[Size]]
    order: list[str]
