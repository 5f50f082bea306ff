"""FWSVD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, register
from workbench.weights.bases.ranked import Ranked
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.solvers.low_rank import row_weighted
from workbench.weights.surgery.linears import outside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOOR = 1e-4  # of the mean importance: outputs without any gradient still count a little


@register
class FWSVD(Ranked):
    """Truncate weights so that rows count by their Fisher information, not all alike.

    A row's importance is the sum of the squared gradients of its weights over calibration texts; the matrix is scaled
    by the root of it, truncated, and scaled back (Hsu et al. 2022, section 3), which is exact for that metric: no
    product of the rank has a smaller importance-weighted error. The paper factorises a model that was trained for one
    task, on that task's loss, and trains on; here the loss is that of the next token, and nothing is trained: on the
    default model at 0.8 that is too little (perplexity 460 thousand, by truncated SVD 15 million). Ranks as by
    truncated SVD. From a share of 1 on the weights stay as they are.
    """

    key = "fwsvd"
    title = "FWSVD"
    paper = Paper("Language model compression with weighted low-rank factorization", "Hsu et al. 2022", "2207.00112")
    claim = "keeps a task better than SVD of the same rank"
    fidelity = Fidelity(
        "untrained part of a trained method", "on the loss of the next token, not of a task, and without training on it"
    )
    default_budget = 0.8

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return outside(model, linears)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        if self.share >= 1:
            return
        gradients = study.gradients(progress)
        for name, linear in progress.track(linears.items(), f"compressing by {self.key}", len(linears)):
            with self.naming(name):
                factors = row_weighted(linear.weight, self.rank(linear), importance(gradients[name].rows))
                twin.set_submodule(name, LowRankLinear(*factors, linear.bias))


def importance(rows: Tensor) -> Tensor:
    """How much each output counts [o], from the squared gradients of its weights: never nothing."""
    mean = rows.mean()
    return rows.clamp_min(_FLOOR * mean) if mean > 0 else rows + 1
