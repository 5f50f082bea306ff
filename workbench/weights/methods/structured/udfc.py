"""Unified data-free compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import PackedLinear, packed_nbytes
from workbench.weights.solvers.quantisation_grid import Grid, fit
from workbench.weights.solvers.random_inputs import channels, data_free_scores, overlap, rebuilt
from workbench.weights.solvers.widths import shared_out
from workbench.weights.surgery.prunable import PrunableModule, activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")  # which one leads into the MLP, first found


@register
class UDFC(StructuredPruner):
    """Leave out neurons and round the rest, and rebuild what both lost from the other neurons, without any data.

    What a damaged channel did is made up for by a linear combination of the channels that are there, which goes into
    the next layer's weights; the combination that errs least has a closed form (Bai et al. 2023). One least squares
    problem serves pruned and rounded neurons alike: the outputs of all whole neurons are to be made of those that stay,
    as they are after rounding. The next layer is then rounded too.

    The paper takes the statistics of a convolution's inputs from batch normalisation. Here they come from the norm
    before the MLP, whose outputs are taken to be independent and normal with the norm's own gains as sizes, and the
    activation is replaced by its best line over them. That is far from what a language model sees: on the default
    model, rebuilding takes a tenth off the error of the first layers and nothing off later ones, so that little can go.
    Which neurons go, equally many in each module, is chosen by peaks (`data_free_scores`). Weights are rounded in
    symmetric groups. Attention stays whole. The bits fix the size of each neuron; a budget above that of all of them
    leaves none out.
    """

    key = "udfc"
    title = "Unified data-free compression"
    paper = Paper(
        "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning", "Bai et al. 2023", "2308.07209"
    )
    claim = "pruning and quantisation together without data: 20.5 % better on ImageNet at 30 % pruned and 6 bits"
    fidelity = Fidelity(
        "deviates", "made for convolutions behind batch normalisation; here inputs of MLPs are assumed normal"
    )
    default_budget = 0.5
    measure: ClassVar[str] = "16-bit size"

    bits: Literal[4, 6, 8] = param(
        8, help="bits of each weight that stays", own="the paper's tables have several; at 8 pruning is what is lost"
    )
    group_size: int = param(
        64,
        ge=8,
        le=1024,
        multiple_of=8,
        unit="columns",
        help="how many columns share a scale",
        own="the paper's convolutions have one scale a channel",
    )
    damping: float = param(
        0.01,
        ge=1e-6,
        le=1,
        help="how strongly the next weight is held, of the neurons' mean square",
        own="the paper's regularisation is one of its own loss",
    )

    def full_nbytes(self, linear: nn.Linear) -> int:
        return 2 * linear.weight.numel()

    def module_nbytes(self, module: PrunableModule, width: int) -> int:
        hidden = module.dimension_nbytes // module.element_size // len(module.layers)
        sides = ((width, hidden), (width, hidden), (hidden, width))
        return sum(packed_nbytes(*side, self.bits, min(self.group_size, side[1]), zero_bytes=0) for side in sides)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        modules = self.prunable_modules(twin, tuple(linears))
        widths = [module.width for module in modules]
        counts, limit = widths, self.limit(linears)
        if limit is not None:
            even = [1.0] * len(modules)
            counts = shared_out(even, widths, lambda index, width: self.module_nbytes(modules[index], width), limit)
        for module, count in progress.track(
            zip(modules, counts, strict=True), f"compressing by {self.key}", len(modules)
        ):
            with self.naming(module.name):
                self._rebuild(twin, module, count)

    def _rebuild(self, twin: PreTrainedModel, module: PrunableModule, count: int) -> None:
        act = activation(twin.get_submodule(module.name))
        assert act is not None  # a module of gated neurons has one
        layers: list[Any] = [twin.get_submodule(name) for name in module.layers]  # gate, up, down
        weights = [layer.weight.detach() for layer in layers]
        squares = gains(twin, module.name, weights[0].shape[1]).square()
        whole = channels(weights[0], weights[1], squares, act)
        kept = data_free_scores(*weights).topk(count).indices.sort().values
        module.prune(twin, kept[None])
        first, grids = [], []
        for weight in weights[:2]:
            grid = self._grid(weight[kept])
            first.append(grid.codes(weight[kept]))
            grids.append(grid)
        damaged = channels(grids[0].dequantised(first[0]), grids[1].dequantised(first[1]), squares, act)
        cross, gram = overlap(whole, damaged, squares), overlap(damaged, damaged, squares)
        last = rebuilt(weights[2], kept, cross, gram, self.damping).float()
        grids.append(self._grid(last))
        codes = [*first, grids[2].codes(last)]
        for name, code, grid in zip(module.layers, codes, grids, strict=True):
            bias: Any = twin.get_submodule(name).bias
            twin.set_submodule(name, PackedLinear(code, grid.scale, None, self.bits, bias, group=grid.group))

    def _grid(self, weight: Tensor) -> Grid:
        return fit(weight, self.bits, min(self.group_size, weight.shape[1]), symmetric=True)


def gains(model: nn.Module, mlp: str, hidden: int) -> Tensor:
    """By how much the norm before an MLP multiplies each channel, float32 [hidden]; ones where none is known."""
    block = model.get_submodule(mlp.rpartition(".")[0])
    norm = next((found for name in _NORMS if (found := getattr(block, name, None)) is not None), None)
    weight = next(model.get_submodule(mlp).parameters())
    if norm is None:
        return torch.ones(hidden, device=weight.device)
    signs = torch.ones(
        hidden, device=weight.device, dtype=weight.dtype
    )  # mean square 1, and mean 0 for norms that centre
    signs[1::2] = -1
    with torch.no_grad():
        sizes: Tensor = norm(signs).float().abs()
        return sizes
