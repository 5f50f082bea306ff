"""Truncated SVD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import nn

from workbench.progress import Progress
from workbench.registry import param, register
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.solvers.low_rank import truncated, whitened
from workbench.weights.surgery.linears import outside

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class SVD(Ranked):
    """Replace every weight matrix by the closest product of two thin ones.

    A matrix [o, i] at rank r holds r (o + i) numbers at 16 bits in place of o i; all layers get the largest rank
    within the same share of their bytes. The plain baseline of all low-rank methods: no calibration, the error of the
    weights themselves is the smallest possible (Eckart and Young 1936), that of the outputs is not: the default model
    loses its answers even at 95 % of the bytes. With the metric "outputs" it is: the weight is truncated in coordinates
    in which the layer's inputs over calibration texts are white (SVD-LLM, Wang et al. 2024, arXiv:2403.07378). From a
    share of 1 on the weights stay as they are.
    """

    key = "svd"
    title = "Truncated SVD"
    claim = "what low-rank methods are compared with"
    default_budget = 0.8

    metric: Literal["weights", "outputs"] = param("weights", help="whose squared error is the smallest possible")

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return outside(model, linears) if self.metric == "outputs" else {}

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        rank = self.rank(linear)
        if not rank:
            return linear
        if inputs is None:
            return LowRankLinear(*truncated(linear.weight, rank), linear.bias)
        return LowRankLinear(*whitened(linear.weight, rank, inputs.hessian), linear.bias)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        if self.metric == "weights" or self.share >= 1:
            return super().apply(twin, linears, study, progress)
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for done, name in enumerate(linears):
                if name in inputs:
                    progress.update(f"compressing by {self.key}", done, len(linears))
                    with self.naming(name):
                        twin.set_submodule(name, self.compress(linears[name], inputs[name]))
