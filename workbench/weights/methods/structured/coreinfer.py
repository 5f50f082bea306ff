"""CoreInfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.structured import WithinBudget
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.text_votes import text_votes
from workbench.weights.layers.core_mlp import JUDGED, CoreMLP, Groups, chosen_set
from workbench.weights.solvers.codebook import codebook
from workbench.weights.surgery.prunable import PrunableModule, activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_JUDGE = 25 / 32  # of the blocks, before the one whose MLP judges a text


@register
class CoreInfer(StructuredPruner):
    """Decode with the MLP neurons that were most active over the prompt and the question, and with no others.

    While text is read, each token votes for its most active neurons, `token_share` of as many as are positive; the
    `share` with the most votes are the sentence's core neurons, and while the answer is decoded only their rows and
    columns are used (Wang et al. 2024). With prediction by "stability" they are those of the text at hand. By
    "similarity" calibration texts are put into `groups` by their core neurons in one late MLP, each group has its core
    neurons in every MLP, and a prompt decodes with those of the group that it is nearest to; that suits short prompts.
    The first and last blocks stay whole. In gated MLPs the votes are those of the products, as in the authors' code.
    Groups are found by Lloyd's algorithm from a fixed beginning. Every pass of several tokens counts as reading, and
    its votes are added.

    This saves the computation and the moved bytes of a decoding step, not stored ones: the next question has other core
    neurons, so all weights stay, and the core's copies come on top (the timeline shows them). A budget, which limits
    what is stored, is refused below 1 for that reason; how little a step touches is set by `share`. Core neurons belong
    to a run, never to the model: two runs do not meet. Methods that read the prompt by themselves use all neurons.
    """

    key = "coreinfer"
    title = "CoreInfer"
    paper = Paper(
        "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation",
        "Wang et al. 2024",
        "2410.18311",
    )
    claim = "10.3 times the speed of Hugging Face's implementation, without a predictor"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "code", "wangqinsi1/CoreInfer, coreinfer.py and cluster.py, 38de332, of 32 blocks 6 and 5",
            share=0.4, token_share=0.2, first=0.1875, last=0.15625, prediction="stability", groups=4,
        ),
        Preset(
            "similarity", "wangqinsi1/CoreInfer, cluster.py, 38de332",
            prediction="similarity", share=0.4, token_share=0.4,
        ),
    )  # fmt: skip
    default_budget: ClassVar[float | None] = None

    share: float = param(0.4, gt=0, le=1, help="of an MLP's neurons, how many a decoding step uses")
    token_share: float = param(0.2, gt=0, le=1, help="of the neurons that are positive, how many a token votes for")
    first: float = param(0.1875, ge=0, le=1, help="of the blocks, how many stay whole at the beginning")
    last: float = param(0.15625, ge=0, le=1, help="of the blocks, how many stay whole at the end")
    prediction: Literal["stability", "similarity"] = param(
        "stability", help="by this text, or by calibration texts like it"
    )
    groups: int = param(4, ge=1, le=256, help="into how many the calibration texts fall")

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = super().survey(model)
        whole = survey.whole + self._groups_nbytes(self.prunable_modules(model, tuple(survey.linears)))
        return replace(survey, whole=whole, least=whole)

    def _taken(self, modules: Sequence[PrunableModule]) -> Sequence[PrunableModule]:
        """The modules that decode with core neurons."""
        return modules[round(self.first * len(modules)) : len(modules) - round(self.last * len(modules))]

    def _groups_nbytes(self, modules: Sequence[PrunableModule]) -> int:
        """What is stored to know the groups by, at most."""
        taken = self._taken(modules)
        if self.prediction == "stability" or not taken:
            return 0
        neurons = sum(4 * max(int(self.share * module.width), 1) for module in taken)
        return self.groups * (neurons + 4 * max(module.width for module in taken))

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        modules = self._taken(self.prunable_modules(twin, tuple(linears)))
        alike: Sequence[Groups | None] = [None] * len(modules)
        if self.prediction == "similarity" and modules:
            alike = self._groups(modules, study, progress)
        for number, module in enumerate(progress.track(modules, f"compressing by {self.key}", len(modules))):
            original = twin.get_submodule(module.name)
            act = activation(original)
            assert act is not None  # a gated MLP has one
            core = CoreMLP(original, act, number, self.token_share, self.share, alike[number])
            twin.set_submodule(module.name, core)

    def _groups(self, modules: Sequence[PrunableModule], study: WeightStudy, progress: Progress) -> list[Groups]:
        """The core neurons of groups of calibration texts, in each of these MLPs."""
        key = ("votes of texts", self.token_share, tuple(module.out for module in modules))
        found = study.once(
            key, lambda: text_votes(study, [module.out for module in modules], self.token_share, progress)
        )
        judge = min(int(_JUDGE * len(study.blocks)), len(study.blocks) - 1)
        at = min(range(len(modules)), key=lambda index: abs(_block_of(modules[index], study) - judge))
        sets = chosen_set(found[at], max(int(JUDGED * modules[at].width), 1))
        centres = codebook(sets, torch.ones_like(sets), min(self.groups, len(sets)))
        member = torch.cdist(sets, centres).argmin(dim=1)  # [t]
        made = []
        for index, counts in enumerate(found):
            total = torch.zeros(len(centres), counts.shape[1], device=counts.device).index_add_(0, member, counts)
            kept = max(int(self.share * counts.shape[1]), 1)
            neurons = total.topk(kept, dim=1).indices.sort(dim=1).values.int()
            made.append(Groups(neurons, centres if index == at else None))
        return made

    def note(self, model: nn.Module) -> str:
        return f"{super().note(model)}; a decoding step uses {self.share:.0%} of the MLPs' neurons, stored are all"


def _block_of(module: PrunableModule, study: WeightStudy) -> int:
    return next(index for index, name in enumerate(study.blocks) if module.name.startswith(f"{name}."))
