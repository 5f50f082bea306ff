"""What methods have in common that truncate weights to their largest singular values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from workbench.progress import Progress
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.solvers.low_rank import truncated, whitened
from workbench.weights.surgery.linears import outside

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TruncatedSVD(Ranked):
    """Base of methods whose weights are the closest products of two thin matrices, by the error of the weights or,
    where `whitens`, of the outputs.
    """

    default_budget = 0.8

    @property
    def whitens(self) -> bool:
        """Whether the error of the outputs over calibration texts counts, not that of the weights."""
        return False

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return outside(model, linears) if self.whitens else {}

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
        if not self.whitens or self.share >= 1:
            super().apply(twin, linears, study, progress)
            return
        for _, inputs in study.inputs(hessians=True, progress=progress):
            for done, name in enumerate(linears):
                if name in inputs:
                    progress.update(f"compressing by {self.key}", done, len(linears))
                    with self.naming(name):
                        twin.set_submodule(name, self.compress(linears[name], inputs[name]))
