"""QuaRot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.core.hadamard import whole
from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.base import Stage, WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.surgery.rotation import (
    DecoderRotation,
    rotated_layers,
    rotated_linear,
    rotation_nbytes,
    unrotatable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class QuaRot(WeightMethod):
    """Rotate what flows through a decoder by Hadamard matrices, which spreads outliers and changes no output.

    Nothing is rounded here, and nothing becomes smaller: that is what a method after it in a recipe is for, as in
    `quarot | gptq`. What flows between blocks is rotated by a Hadamard matrix with random signs, the values of each
    head and, across heads, the outputs of attention by Hadamard matrices, and the neurons of feed-forward modules by
    another (section 4, stages 1a to 1c). All but the rotations across heads and of neurons, and those at both ends of
    the decoder, which leave the tables of the embedding and of a tied head the original's own, goes into the weights,
    as do the weights of the norms.

    The authors' code centres embeddings besides, which is not exact where norms do not centre either; here nothing is.
    Sizes that are no powers of two get Paley's matrices (576 = 36 * 16), or where there is none, blocks of powers of
    two side by side; numbers of heads without a matrix (9) are not rotated across, where the authors' code stops.
    Queries and keys are not rotated behind their positions: that helps a quantised cache, not these weights.
    """

    key = "quarot"
    title = "QuaRot"
    paper = Paper("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", "Ashkboos et al. 2024", "2404.00456")
    claim = "no outliers left in weights and activations, so that all of them do with 4 bits"
    fidelity = Fidelity("as published")
    measure: ClassVar[str] = "size"
    stage: ClassVar[Stage] = "transform"

    seed: int = param(
        0, ge=0, le=2**31 - 1, help="which random signs", own="the authors' code draws another with each run"
    )

    @property
    def together(self) -> str:
        return "its layers share one rotation"

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return unrotatable(self.key, model, linears)

    def full_nbytes(self, linear: nn.Linear) -> int:
        return linear.weight.nbytes

    def nbytes(self, linear: nn.Linear) -> int:
        return self.full_nbytes(linear)

    def recast(self, model: nn.Module) -> dict[str, str]:
        return rotated_layers(model)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        return super().total_nbytes(linears) + rotation_nbytes(linears)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        decoder = DecoderRotation(twin)
        signs, heads = decoder.signs(self.seed), decoder.heads if whole(decoder.heads) else 1
        for block in progress.track(decoder.blocks, f"compressing by {self.key}", len(decoder.blocks)):
            for name, rotation in decoder.rotations(block, signs, heads=heads).items():
                made = rotated_linear(linears[name], rotation)
                live = name.endswith("mlp.down_proj") or rotation.heads > 1  # rotated as the model runs
                twin.set_submodule(name, RotatedLinear(made, rotation.heads) if live else made)
        decoder.rotate_ends(twin, signs)
