"""OdysseyLLM."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import IntegerLinear, packed_nbytes
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.quantisation_grid import Grid, fit_least

_BITS: Literal[4] = 4
_DAMPING = "GPTQ's own; the paper names none"


@register
class Odyssey(WeightMethod):
    """Hold weights at 4 bits with one scale for each output, round each token to 8 bits, and multiply integers.

    The recipe: symmetric ranges cut where the error is smallest, then the columns rounded in turn so that later ones
    make up for earlier (GPTQ); no groups and no zeros, which would stand inside the integers' sums. In the product a
    4-bit code lies in the upper half of a byte, which costs one shift, and the scale takes the factor 16 back
    ("FastGEMM", section 5.3); see `IntegerLinear` for where integers are really multiplied.

    The paper learns how far ranges are cut by gradient on each block's output (section 5.1). Here each row tries
    `clips` ranges, evenly down to half of its own, and takes the one with the smallest squared error, each column
    weighed by the mean square of its input.
    """

    key = "odyssey"
    title = "OdysseyLLM"
    paper = Paper("A Speed Odyssey for Deployable Quantization of LLMs", "Li et al. 2023", "2311.09550")
    claim = "four times as fast as 16 bits with weights at 4 and activations at 8 bits"
    fidelity = Fidelity("untrained part of a trained method", "ranges are searched; the paper learns them by gradient")
    presets = (Preset("abstract", "weights of 4 and activations of 8 bits", input_bits=8),)
    needs_hessian: ClassVar[bool] = True

    clips: int = param(
        20, ge=1, le=100, help="how many ranges are tried for each row", own="the paper learns the ranges"
    )
    damping: float = param(
        0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean", own=_DAMPING
    )
    input_bits: Literal[4, 8] = param(8, help="bits of each activation")

    def nbytes(self, linear: nn.Linear) -> int:
        return packed_nbytes(linear.out_features, linear.in_features, _BITS, linear.in_features, zero_bytes=0)

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> IntegerLinear:
        assert inputs is not None
        weight = linear.weight.detach().float()
        grid = clipped(weight, inputs.square, self.clips)
        done = gptq(weight, inputs.hessian, lambda *_: grid, weight.shape[1], damping=self.damping)
        return IntegerLinear(done.codes, done.scale, None, _BITS, linear.bias, input_bits=self.input_bits)


def clipped(weight: Tensor, square: Tensor, clips: int) -> Grid:
    """The symmetric 4-bit grid of each row of weight [o, i] whose cut range has the smallest error, columns weighed by
    the mean squares of their inputs [i].
    """
    shares = [1 - 0.5 * number / clips for number in range(clips)]
    costs = square.float()[:, None]
    return fit_least(weight, _BITS, weight.shape[1], shares, lambda change: change.square() @ costs, symmetric=True)
