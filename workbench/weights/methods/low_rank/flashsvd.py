"""FlashSVD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.truncated_svd import TruncatedSVD
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.layers.streamed_mlp import StreamedMLP, activation_name
from workbench.weights.surgery.prunable import PrunableMLP, activation, prunable_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class FlashSVD(TruncatedSVD):
    """Compute with low-rank weights tile by tile, so that their wide activations never exist as a whole.

    Weights as by truncated SVD; a gated feed-forward module then computes `tile` tokens by `tile` neurons at a time
    and sums what they add in the low-rank space of its last layer (the paper's streaming of the feed-forward part). The
    outputs are those of SVD, the peak of activations is lower. The paper also fuses the projections of queries, keys
    and values into the attention kernel; here attention is handed them whole, for it is recorded and shown.
    Modules of another form, or with another activation than SiLU, GELU or ReLU, keep computing layer by layer.
    """

    key = "flashsvd"
    title = "FlashSVD"
    paper = Paper("FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models", "Shao et al. 2025")
    fidelity = Fidelity("deviates", "the feed-forward part is streamed; queries, keys and values are made whole")
    claim = "70 % less peak activation memory with low-rank weights, at the same outputs"

    metric: Literal["weights", "outputs"] = param(
        "weights", help="whose error is the smallest possible: as by svd, or as by svd-llm",
        own="the paper streams whatever factors there are; those of plain SVD need no calibration",
    )  # fmt: skip
    tile: int = param(
        128, ge=8, le=4096, help="tokens, and neurons, that a CPU computes together", own="of this machine"
    )

    @property
    def together(self) -> str:
        return "its layers are streamed together"

    @property
    def whitens(self) -> bool:
        return self.metric == "outputs"

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        gated = [module for module in prunable_modules(twin, tuple(linears)) if isinstance(module, PrunableMLP)]
        super().apply(twin, linears, study, progress)
        for module in gated:
            act = activation(twin.get_submodule(module.name))
            parts = [twin.get_submodule(name) for name in module.layers]
            thin = [part for part in parts if isinstance(part, LowRankLinear)]
            if len(thin) == 3 and activation_name(act):
                twin.set_submodule(module.name, StreamedMLP(thin[0], thin[1], thin[2], act, self.tile))
