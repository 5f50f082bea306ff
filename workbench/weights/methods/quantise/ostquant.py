"""OSTQuant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from workbench.progress import Progress
from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CompactLinear, IntegerLinear
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.quantisation_grid import Grid
from workbench.weights.surgery.rotation import (
    DecoderRotation,
    LayerRotation,
    rotated_layers,
    rotated_linear,
    rotation_nbytes,
    unrotatable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class OSTQuant(Quantiser):
    """Rotate and scale weights, which changes nothing that the model computes, so that rounding them loses less.

    Without what the paper learns this is QuaRot and a scaling in closed form, rounded by GPTQ in one pass.

    Of the paper's equivalent transformations (section 4.1), those that need no training. What flows between blocks is
    rotated by a Hadamard matrix with random signs, the values of each head and the neurons of each feed-forward module
    by Hadamard matrices, as in QuaRot (Ashkboos et al. 2024, arXiv:2404.00456). Sizes that are no powers of two get
    Paley's matrices (576 = 36 * 16, 1536 = 12 * 128), or where there is none, blocks of powers of two side by side. The
    weights of the norms go into the layers behind them; nothing is centred. With `scaling`, channels of values and
    neurons are scaled by what rounding costs least with (`rotation.balance`), in place of the paper's learned factors.
    Queries and keys stay as they are: rotating them would help a quantised cache, not these weights. Learned rotations,
    scales behind the norms and of queries and keys, and the KL-Top loss are not here.

    At both ends the rotation is done as the model runs, so that the tables of the embedding and of a tied head stay
    the original's own; the neurons' too. Weights are then rounded to nearest or by GPTQ on the Hessians of the
    rotated inputs, which follow from those of the original; activations too, with `input_bits` below 16, token by
    token. The random signs, one byte a channel, and biases that are rotated are counted.
    """

    key = "ostquant"
    title = "OSTQuant"
    paper = Paper(
        "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations for Better "
        "Distribution Fitting",
        "Hu et al. 2025",
        "2501.13987",
    )
    claim = "99.5 % of the 16-bit accuracy at 4-bit weights, with learned transformations"
    fidelity = Fidelity(
        "untrained part of a trained method", "rotations and scalings are given by formula: nothing is learned"
    )

    rounding: Literal["gptq", "nearest"] = param(
        "gptq", help="how the rotated weights are rounded", own="the paper rounds weights by GPTQ (section 5)"
    )
    scaling: bool = param(
        True, help="scale channels of values and neurons", own="in place of the paper's learned scaling"
    )
    input_bits: Literal[4, 8, 16] = param(
        16, help="bits of what enters each layer; 16: it is not rounded", own="the claim is of 4-bit weights alone"
    )
    damping: float = param(
        0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean", own="that of GPTQ's code"
    )
    seed: int = param(0, ge=0, le=2**31 - 1, help="which random signs", own="no source gives one")

    @property
    def together(self) -> str:
        return "its layers share one rotation"

    def refused(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
        return unrotatable(self.key, model, linears)

    def recast(self, model: nn.Module) -> dict[str, str]:
        return rotated_layers(model)

    def total_nbytes(self, linears: Mapping[str, nn.Linear]) -> int:
        return super().total_nbytes(linears) + rotation_nbytes(linears)

    def apply(
        self, twin: PreTrainedModel, linears: Mapping[str, nn.Linear], study: WeightStudy, progress: Progress
    ) -> None:
        decoder = DecoderRotation(twin)
        signs = decoder.signs(self.seed)
        stage, done = f"compressing by {self.key}", 0
        for block, inputs in study.inputs(hessians=self.rounding == "gptq", progress=progress):
            squares = {name: stats.square for name, stats in inputs.items()} if self.scaling else None
            rotations = decoder.rotations(block, signs, squares)
            for name in (name for name in linears if name in rotations):
                progress.update(stage, done, len(linears))
                with self.naming(name):
                    small = self.rounded(linears[name], rotations[name], inputs[name])
                twin.set_submodule(name, RotatedLinear(small) if name.endswith("mlp.down_proj") else small)
                done += 1
        decoder.rotate_ends(twin, signs)
        progress.update(stage, done, len(linears))

    def rounded(self, linear: nn.Linear, rotation: LayerRotation, inputs: InputStats) -> CompactLinear:
        """The layer that holds the rounded weights of this one as it becomes."""
        rotated = rotated_linear(linear, rotation)
        weight, group = rotated.weight.detach().float(), self.group(linear)
        if self.rounding == "gptq":
            hessian = rotation.hessian(inputs.hessian)
            done = gptq(weight, hessian, lambda part, _: self.grid(part), group, damping=self.damping)
            codes, grid = done.codes, Grid(done.scale, done.zero, self.bits, group)
        else:
            grid = self.grid(weight)
            codes = grid.codes(weight)
        if self.input_bits == 16:
            return self.packed(codes, grid, rotated.bias)
        zero = None if self.symmetric else grid.zero.to(torch.uint8)
        return IntegerLinear(codes, grid.scale, zero, self.bits, rotated.bias, group=group, input_bits=self.input_bits)
