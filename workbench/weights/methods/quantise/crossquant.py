"""CrossQuant."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from workbench.registry import Paper, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import IntegerLinear, packed_nbytes
from workbench.weights.solvers.quantisation_grid import fit

_FLOOR = 1e-4  # of the largest channel: the smallest that a channel counts as


@register
class CrossQuant(WeightMethod):
    """Round weights and activations, each activation in a step between that of its token and that of its channel.

    The step of x_ij is t_i to the power `alpha` times c_j to the power 1 - `alpha`, over 2 ** (input_bits - 1) - 1:
    t_i the largest magnitude of token i, c_j that of channel j (section 4.2, equation 5). Where a few channels hold
    outliers, steps of a token alone round most of the others to zero: the "quantisation kernel"
    (`workbench.measure.kernel_share`), which this keeps small. Weights are rounded symmetrically in groups of columns.

    c_j is what calibration saw, not what the tokens at hand have: so a token's numbers do not depend on those computed
    with it, and one that decodes alone gets the same. An activation beyond what was seen is cut to what its step
    reaches. As c_j stands inside the sum over channels, and is not moved into the weights, whose rounding it would
    spoil, the rounded numbers are multiplied as floating point: this shows the accuracy, and saves the weights' bytes.
    """

    key = "crossquant"
    title = "CrossQuant"
    paper = Paper(
        "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel for Precise Large Language "
        "Model Compression",
        "Liu et al. 2024",
        "2410.07505",
    )
    claim = "activations at 8 bits with hardly a loss, beside weights at 8 or 4 bits"
    needs_inputs: ClassVar[bool] = True

    bits: Literal[4, 8] = param(8, help="bits of each weight")
    input_bits: Literal[4, 8] = param(8, help="bits of each activation")
    alpha: float = param(0.15, ge=0, le=1, help="1: steps of each token alone; 0: of each channel alone")
    group_size: int = param(128, ge=8, le=8192, multiple_of=8, unit="columns", help="how many columns share a scale")

    def nbytes(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        return packed_nbytes(outputs, inputs, self.bits, self.group_size, zero_bytes=0) + 2 * inputs

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> IntegerLinear:
        assert inputs is not None
        weight = linear.weight.detach()
        grid = fit(weight, self.bits, min(self.group_size, weight.shape[1]), symmetric=True)
        return IntegerLinear(
            grid.codes(weight),
            grid.scale,
            None,
            self.bits,
            linear.bias,
            group=grid.group,
            input_bits=self.input_bits,
            inputs=channel_factor(inputs.absmax, self.alpha),
            exponent=self.alpha,
        )


def channel_factor(absmax: Tensor, alpha: float) -> Tensor:
    """What the largest magnitudes of channels [i] contribute to steps: their power 1 - alpha."""
    least = max(_FLOOR * float(absmax.max()), 1e-6)
    return absmax.clamp_min(least).pow(1 - alpha)
