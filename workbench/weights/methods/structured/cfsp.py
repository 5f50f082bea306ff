"""CFSP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from workbench.models.decoder import placed
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.solvers.widths import shared_out
from workbench.weights.surgery.prunable import PrunableModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_shares(similarity: Tensor, sharpness: float, kept: float) -> list[float]:
    """What share of its neurons each block keeps where `kept` of all do (coarse importance).

    similarity: cosines between what enters and leaves the blocks [l]. A block matters by the angle between the two, as
    a part of π; shares are in proportion to the sigmoid of how far that is from the mean. Where a block would keep more
    than it has, all differences shrink alike, so that the most important one keeps everything.
    """
    angles = similarity.clamp(-1, 1).arccos() / math.pi
    weights = torch.sigmoid(sharpness * (angles - angles.mean()))
    weights = weights / weights.mean()
    excess = float(weights.max()) * kept
    if excess > 1:
        weights = 1 + (weights - 1) * (1 / kept - 1) / float(weights.max() - 1)
    return [float(weight) * kept for weight in weights]


def neuron_scores(gate: Tensor, up: Tensor, down: Tensor, squares: Tensor) -> Tensor:
    """How much each neuron of a gated MLP matters (fine importance), float32 [i].

    Its activation, root mean square over calibration, times the sizes (sums of absolute values) of its row of `gate`
    and of `up` [i, hidden] and its column of `down` [hidden, i], each relative to the mean neuron's.
    """
    sizes = [gate.float().abs().sum(dim=1), up.float().abs().sum(dim=1), down.float().abs().sum(dim=0)]
    relative = torch.stack([size / size.mean().clamp_min(1e-12) for size in sizes]).sum(dim=0)
    return relative * squares.sqrt()


@register
class CFSP(StructuredPruner):
    """Leave out MLP neurons, more of them in blocks that change little, chosen by activation and weight.

    Coarse to fine (Wang et al. 2024): each block's share follows the angle between what enters and leaves it, the
    neurons within a block are ranked by activation times relative weight. One forward pass over calibration serves
    both. Weights are relative to the mean neuron's; the published code divides each neuron's by their own sum, after
    which all are equal and only activations rank. The angle is that of the blocks' mean cosine; the paper rounds widths
    to multiples of 128, here a byte budget is used to the neuron; its training after pruning is left out. Attention
    stays whole.
    """

    key = "cfsp"
    title = "CFSP"
    paper = Paper(
        "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
        "Wang et al. 2024",
        "2409.13199",
    )
    claim = "the best structured pruning at high sparsity, in one forward pass"
    fidelity = Fidelity(
        "deviates", "weights count relative to the mean neuron's, where those of the authors' code cancel"
    )
    presets = (
        Preset(
            "code", "wyxscir/CFSP, start.sh and lib/prune.py, b2d5b13: a=1 on sums over 128 x 2048 tokens, over 10,000",
            sharpness=26.2144,
        ),
    )  # fmt: skip
    default_budget = 0.8
    needs_inputs: ClassVar[bool] = True

    sharpness: float = param(26.2144, ge=0, le=200, help="how much blocks differ in what they keep; 0: not at all")

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None:
            return
        modules = self.prunable_modules(twin, tuple(linears))
        ranked = study.once("cfsp scores", lambda: self._scores(modules, linears, study, progress))
        full = sum(self.module_nbytes(module, module.width) for module in modules)
        similarity = study.similarity(progress)
        of = [placed(module.name, study.blocks)[0] or 0 for module in modules]
        shares = kept_shares(similarity[of], self.sharpness, limit / full)
        widths = [module.width for module in modules]
        counts = shared_out(shares, widths, lambda index, width: self.module_nbytes(modules[index], width), limit)
        for module, count in progress.track(
            zip(modules, counts, strict=True), f"compressing by {self.key}", len(modules)
        ):
            if count < module.width:
                module.prune(twin, ranked[module.name].topk(count).indices.sort().values[None])

    def _scores(
        self,
        modules: Sequence[PrunableModule],
        linears: Mapping[str, nn.Linear],
        study: WeightStudy,
        progress: Progress,
    ) -> dict[str, Tensor]:
        scores = {}
        for _, inputs in study.inputs(hessians=False, progress=progress):
            for module in (module for module in modules if module.out in inputs):
                gate, up, down = (linears[name].weight.detach() for name in module.layers)
                scores[module.name] = neuron_scores(gate, up, down, inputs[module.out].square)
        return scores
