"""SVD-LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.truncated_svd import TruncatedSVD
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.solvers.low_rank import updated, whitened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class SVDLLM(TruncatedSVD):
    """Truncate weights in coordinates in which the layer's inputs are white, so that its outputs change least.

    With the Cholesky factor S of the inputs' second moment, W S is truncated and S undone again: each singular value
    left out is then what the outputs lose (Wang et al. 2024, section 3.1). All layers keep the same share of their
    bytes, as in the authors' code. With `update`, the left factor is fitted again, in closed form, to what the layer
    puts out for the inputs that the compressed blocks before it give (section 3.2): a block's layers are all fitted on
    the block as it was. The fine-tuning by LoRA that the authors' script goes on with is left out.
    """

    key = "svd-llm"
    title = "SVD-LLM"
    paper = Paper(
        "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        "Wang et al. 2024",
        "2403.07378",
    )
    claim = "the lowest perplexity of low-rank weights, most of all at high compression"
    fidelity = Fidelity("as published")
    presets = (
        Preset("whitening", "AIoT-MLSys-Lab/SVD-LLM, compress_llama.sh and SVDLLM.py --step 1, 1c1009a", update=False),
        Preset("update", "AIoT-MLSys-Lab/SVD-LLM, SVDLLM.py --step 2, 1c1009a", update=True),
    )

    update: bool = param(False, help="fit the left factor again on what the compressed blocks before a layer give it")

    @property
    def whitens(self) -> bool:
        return True

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        if not self.update or self.share >= 1:
            super().apply(twin, linears, study, progress)
            return
        plain, behind = study.inputs(hessians=True), study.inputs(hessians=True, behind=twin, progress=progress)
        for (_, inputs), (_, now) in zip(plain, behind, strict=True):
            for done, name in enumerate(linears):
                if name in inputs:
                    progress.update(f"compressing by {self.key}", done, len(linears))
                    linear = linears[name]
                    with self.naming(name):
                        down, _ = whitened(linear.weight, self.rank(linear), inputs[name].hessian)
                        factors = down, updated(linear.weight, down, now[name].hessian)
                        twin.set_submodule(name, LowRankLinear(*factors, linear.bias))
