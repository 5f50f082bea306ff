"""CoreInfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.progress import Progress
from workbench.registry import Paper, param, register
from workbench.weights.bases.structured import WithinBudget
from workbench.weights.bases.structured_pruner import StructuredPruner
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.core_mlp import CoreMLP
from workbench.weights.surgery.prunable import activation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class CoreInfer(StructuredPruner):
    """Decode with the MLP neurons that were most active over the prompt and the question, and with no others.

    While text is read, each token votes for the `token_share` of neurons that it activates most, by magnitude; the
    `share` with the most votes are the sentence's core neurons, and while the answer is decoded only their rows and
    columns are used (Wang et al. 2024, the stability-guided prediction; the one by clusters of sentences is left out).
    Its published code counts positive activations alone, of which a token votes for a share, and leaves the first six
    and last five of 32 blocks whole; in gated MLPs products of either sign matter, and here all blocks take part. No
    predictor, no calibration. Every pass of several tokens counts as reading, and its votes are added.

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
    default_budget: ClassVar[float | None] = None

    share: float = param(0.4, gt=0, le=1, help="of an MLP's neurons, how many a decoding step uses")
    token_share: float = param(0.4, gt=0, le=1, help="of an MLP's neurons, how many each token votes for")

    def survey(self, model: nn.Module) -> WithinBudget:
        survey = super().survey(model)
        return replace(survey, least=survey.whole)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        modules = self.prunable_modules(twin, tuple(linears))
        for number, module in enumerate(progress.track(modules, f"compressing by {self.key}", len(modules))):
            original = twin.get_submodule(module.name)
            act = activation(original)
            assert act is not None  # a gated MLP has one
            twin.set_submodule(module.name, CoreMLP(original, act, number, self.token_share, self.share))

    def note(self, model: nn.Module) -> str:
        return f"{super().note(model)}; a decoding step uses {self.share:.0%} of the MLPs' neurons, stored are all"
