"""MoDeGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.models.decoder import decoder_layers
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.structured import WithinBudget
from workbench.weights.bases.structured_pruner import IntraModulePruner
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.solvers.block_widths import allocate, by_block, shares
from workbench.weights.solvers.mixed_values import mix_values
from workbench.weights.solvers.module_decompositions import (
    leverage,
    moment_of,
    nystrom,
    pair_scores,
)
from workbench.weights.surgery.prunable import (
    PrunableAttention,
    PrunableModule,
    PrunableQueriesKeys,
    prunable_modules,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class MoDeGPT(IntraModulePruner):
    """Make modules narrower inside, each kind by its own decomposition, most of all in blocks that do little.

    Feed-forward modules (Nyström approximation): the neurons with the largest ridge leverage in the correlation C of
    their activations stay, and the layer that follows is refitted to them, C[all, kept] C[kept, kept]⁻¹, which is least
    squares on the original's output. Values and outputs of attention (SVD): each KV head's values are replaced by the
    few mixtures of them that keep what its query heads' outputs make of them, the smallest error of any such rank. The
    share that goes differs from block to block: L φ softmax(-s / ε), where s is one minus the cosine between what
    enters and leaves a block (Lin et al. 2024, sections 3.2 and 3.3).

    Queries and keys (CR decomposition): those channels stay whose scores, the product of their root mean squares in
    queries and in keys, are largest. RoPE turns channels in pairs, so that pairs stay or go, scored by the mean squares
    of both, which no rotation changes; the pairs that stay keep their frequencies, each KV head its own, and count for
    all its query heads together. Where queries and keys are normalised before they are turned they stay whole.
    With `queries_keys=False` they stay whole everywhere: scores are exact, and every cache method knows the rotation.

    With `sequential`, correlations are measured again behind the blocks that are narrow already, as in the paper;
    otherwise they are those of the uncompressed model.

    Budget: the share of the bytes of the layers that are narrowed, at the precision they are held in. The cache becomes
    smaller with the values. From a share of 1 on the weights stay as they are.
    """

    key = "modegpt"
    title = "MoDeGPT"
    paper = Paper(
        "MoDeGPT: Modular Decomposition for Large Language Model Compression", "Lin et al. 2024", "2408.09632"
    )
    claim = "90-95 % of zero-shot accuracy at 25-30 % compression, without training"
    fidelity = Fidelity("as published")
    default_budget = 0.75
    needs_hessian: ClassVar[bool] = True

    queries_keys: bool = param(
        True, help="narrow queries and keys too", own="the paper's whole method; its three kinds of modules"
    )
    sequential: bool = param(
        True, help="measure behind the blocks that are narrow already; else the plain model",
        own="as the paper does",
    )  # fmt: skip
    temperature: float = param(
        0.1,
        gt=0,
        le=100,
        help="ε: the lower, the more blocks differ in what they lose",
        own="the paper tunes it for each model",
    )
    ridge: float = param(
        0.01,
        gt=0,
        le=100,
        help="λ of the leverage, in mean squares of a neuron: below it, directions count for little",
        own="no source could be read; 1 gives KL 0.64 on workbench-tiny at 0.8, this 0.66",
    )

    def prunable_modules(self, model: nn.Module, names: Sequence[str] | None = None) -> list[PrunableModule]:
        kinds = (*self.narrows, PrunableQueriesKeys) if self.queries_keys else self.narrows
        return [module for module in prunable_modules(model, names) if isinstance(module, kinds)]

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = super().survey(model)  # what is whole needs no numbers of channels
        return replace(survey, whole=min(survey.whole, survey.full_nbytes))

    def stays_whole(self, name: str) -> str:
        if self.queries_keys and name.endswith(("q_proj", "k_proj")):
            return "queries and keys are normalised before they are turned, or their attention is of no known class"
        return super().stays_whole(name)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None:
            return
        modules = by_block(self.prunable_modules(twin, tuple(linears)), list(decoder_layers(twin)))
        for _ in study.inputs(hessians=True, progress=progress):
            pass  # one pass over the texts, which tells how much each block does, too
        losses = shares(1 - study.similarity(progress), self.temperature)
        widths = dict(zip(modules, allocate(list(modules.values()), losses.tolist(), limit), strict=True))
        behind = study.inputs(hessians=True, behind=twin if self.sequential else None)
        steps = progress.track(behind, f"compressing by {self.key}", len(modules))
        for block, inputs in steps:
            for module, width in zip(modules[block], widths[block], strict=True):
                if width < module.width:
                    with self.naming(module.out):
                        self._narrow(twin, module, width, inputs)

    def _narrow(
        self, twin: PreTrainedModel, module: PrunableModule, width: int, inputs: Mapping[str, InputStats]
    ) -> None:
        if isinstance(module, PrunableAttention):
            mix_values(twin, module, width, inputs)
            return
        if isinstance(module, PrunableQueriesKeys):
            queries, keys = (moment_of(twin.get_submodule(name), inputs[name]) for name in module.layers)
            scores = pair_scores(queries, keys, module.heads, module.groups)
            module.prune(twin, scores.topk(width, dim=1).indices.sort(dim=1).values)
            return
        hessian = inputs[module.out].hessian
        kept = leverage(hessian, self.ridge).topk(width).indices.sort().values
        out = twin.get_submodule(module.out)
        assert isinstance(out, nn.Linear)
        module.prune(twin, kept[None], nystrom(out.weight.detach(), hessian, kept))
