"""COMP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.block_pruner import BlockPruner
from workbench.weights.bases.structured import WithinBudget
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.solvers.matrix_condition import leverage, remaining, tuned
from workbench.weights.solvers.widths import shared_out
from workbench.weights.surgery.depth import shorten
from workbench.weights.surgery.prunable import PrunableMLP, PrunableModule, prunable_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class COMP(BlockPruner):
    """Remove the least important blocks, then neurons of the others by matrix condition, and tune a mask for the rest.

    Blocks go by the mean cosine between what enters and leaves them over calibration, until the share `coarse` of what
    has to go is gone; in those that stay, MLPs lose the neurons that hold up the condition of their last matrix least,
    equally many in each, and what stays is scaled neuron by neuron to bring the module's output back: after the
    abstract of Xu et al. 2025. How blocks, condition and mask are computed is chosen here. Condition is the leverage of
    a neuron's column among all, at the size of its activation, regularised. The mask comes from one linear system and
    is multiplied into the weights. Inputs are those of the uncompressed model.
    """

    key = "comp"
    title = "COMP"
    paper = Paper(
        "Lightweight and Post-Training Structured Pruning for On-Device Large Language Models",
        "Xu et al. 2025",
        "2501.15255",
    )
    claim = "6 % better than LLM-Pruner at 20 % pruned, without training and with 80 % less memory"
    fidelity = Fidelity(
        "reconstructed from the abstract", "how importance, condition and mask are computed is chosen here"
    )
    default_budget = 0.85
    needs_hessian: ClassVar[bool] = True

    coarse: float = param(
        0.3,
        ge=0,
        le=1,
        help="of the bytes that have to go, how many go as whole blocks, at most",
        own="the abstract gives none; a third of what goes, in whole blocks",
    )
    damping: float = param(
        0.01, ge=1e-6, le=1, help="how strongly the mask is held at 1", own="the abstract gives none"
    )

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = super().survey(model)
        if not _mlps(model, survey.linears):
            raise NotApplicable(
                f"{self.key}: no layer of this {type(model).__name__} has {PrunableMLP.what}, whose neurons could go"
            )
        return survey

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        limit = self.limit(linears)
        if limit is None:
            return
        names = list(decoder_layers(twin))
        sizes = self.block_nbytes(twin, linears)
        modules = {placed(module.name, names)[0]: module for module in _mlps(twin, linears)}
        spare = [
            modules[at].dimension_nbytes * (modules[at].width - 1) if at in modules else 0 for at in range(len(names))
        ]
        order = study.similarity(progress).argsort(descending=True).tolist()
        staying = remaining(order, sizes, spare, limit, self.coarse)
        narrow = [modules[index] for index in staying if index in modules]
        room = limit - sum(sizes[index] for index in staying) + sum(x.dimension_nbytes * x.width for x in narrow)
        each, widths = [module.dimension_nbytes for module in narrow], [module.width for module in narrow]
        kept_widths = shared_out([1.0] * len(narrow), widths, lambda index, width: each[index] * width, room)
        counts = {module.out: count for module, count in zip(narrow, kept_widths, strict=True)}
        done = 0
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for module in (module for module in narrow if module.out in inputs):
                progress.update(f"compressing by {self.key}", done, len(narrow))
                if counts[module.out] < module.width:
                    down, seen = linears[module.out].weight.detach(), inputs[module.out]
                    kept = leverage(down, seen.square).topk(counts[module.out]).indices.sort().values
                    mask = tuned(down, seen.hessian, kept, self.damping)
                    with self.naming(module.out):
                        module.prune(twin, kept[None], down[:, kept].double() * mask)
                done += 1
        progress.update(f"compressing by {self.key}", len(narrow), len(narrow))
        shorten(twin, staying)


def _mlps(model: nn.Module, linears: Mapping[str, nn.Linear]) -> list[PrunableModule]:
    """The gated MLPs all of whose layers are among these."""
    return [module for module in prunable_modules(model, tuple(linears)) if isinstance(module, PrunableMLP)]
