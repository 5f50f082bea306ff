"""PB-LLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.weights.bases.sequential import Sequential
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import OutliersLinear, PackedLinear, Parts, outliers_nbytes, packed_nbytes
from workbench.weights.layers.outliers import nearest_eight
from workbench.weights.solvers.compensation import compensated, removal_cost
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import stored_scale

_CODE = "hahnyuan/PB-LLM, gptq_pb/run_all.sh (low_frac 0.8) and run.py, fe85da9"


@register
class PBLLM(Sequential):
    """Hold a salient few of the weights at 8 bits and only the sign of all others.

    Salient are the largest weights, or those whose loss costs most once the columns to their right have made up for
    it (`removal_cost`, section 3.3), over the whole matrix. The others become plus or minus α, their mean magnitude in
    an output: the α with the smallest squared error (equation 9). Columns are replaced in turn, and those to come make
    up for each ("PB-GPTQ", section 3.3). A sign is held for the salient weights too, and at 8 bits what they are beyond
    it. The authors' code shifts the signs by the mean of each output's weights, and finds both over all of them, the
    salient ones counted as zero; here there is no shift.

    Without the paper's training (section 3.4), which is not here, few salient weights are not enough: the paper's own
    OPT-1.3B has perplexity 166 on C4 at one in ten, 42 at one in five and 18 at one in two (table 1).

    Everything counts: at one weight in five, a sign takes one bit a weight, the salient codes 1.6,
    and their places, one bit for each weight, 1. The paper's 2.7 at one in ten (equation 3) are all but the scales. At
    one in fifty all of it takes 1.5.
    """

    key = "pb-llm"
    title = "PB-LLM"
    paper = Paper("PB-LLM: Partially Binarized Large Language Models", "Shang et al. 2023", "2310.00034")
    claim = "binarised but for a salient few, 2.7 bits a weight at one in ten, and trainable back to use"
    fidelity = Fidelity("untrained part of a trained method", "PB-GPTQ alone, without the training of section 3.4")
    presets = (
        Preset("one in five", _CODE, salient=0.2, metric="hessian", group_size=0, damping=0.01, sequential=True),
        Preset("one in ten", "the same (low_frac 0.9), and equation 3: 2.7 bits", salient=0.1),
    )
    needs_hessian: ClassVar[bool] = True

    salient: float = param(0.2, ge=0, le=0.5, help="share of the weights that are held at 8 bits")
    metric: Literal["hessian", "magnitude"] = param("hessian", help="what makes a weight salient")
    group_size: int = param(
        0, ge=0, le=8192, multiple_of=8, unit="columns", help="how many columns share an α; 0: all of an output's"
    )
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")

    def nbytes(self, linear: nn.Linear) -> int:
        outputs, inputs = linear.weight.shape
        signs = packed_nbytes(outputs, inputs, 1, self._group(linear), zero_bytes=0)
        count = self._count(linear)
        return signs + (outliers_nbytes(outputs, inputs, count, 8) if count else 0)

    def _group(self, linear: nn.Linear) -> int:
        return min(self.group_size or linear.in_features, linear.in_features)

    def _count(self, linear: nn.Linear) -> int:
        return int(self.salient * linear.weight.numel())

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> nn.Module:
        assert inputs is not None
        weight = linear.weight.detach().float()
        factor = inverse_factor(inputs.hessian, self.damping)
        saliency = weight.abs() if self.metric == "magnitude" else removal_cost(weight, factor.diagonal())
        chosen = largest(saliency, self._count(linear))
        group = self._group(linear)
        made = binarised(weight, chosen, factor, group)
        bias = None if chosen.any() else linear.bias
        signs = PackedLinear(made.codes, 2 * made.alpha, None, 1, bias, group=group)
        if not chosen.any():
            return signs
        beyond = OutliersLinear(made.beyond, chosen, scale=made.step)
        return Parts([signs, beyond], [None, None], linear.in_features, linear.bias)


def largest(saliency: Tensor, count: int) -> Tensor:
    """Which `count` of [o, i] are the largest, bool; of equal ones the first."""
    order = saliency.flatten().argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(saliency.numel(), dtype=torch.bool, device=saliency.device)
    return chosen.index_fill_(0, order, True).view_as(saliency)


class Binarised(NamedTuple):
    """A weight [o, i] as signs and what some are beyond them.

    codes: uint8 [o, i], 1 for plus. alpha: [o, g], the size of the others in each group of columns. beyond: [o, i],
    whole numbers times `step` [o] where a weight is salient.
    """

    codes: Tensor
    alpha: Tensor
    beyond: Tensor
    step: Tensor


def binarised(weight: Tensor, chosen: Tensor, factor: Tensor, group: int) -> Binarised:
    """Weight [o, i] but for the chosen ones as signs, in turn; each group's size is that of its columns when the first
    is due.
    """
    group = min(group, weight.shape[1])
    step = stored_scale((weight.abs() * chosen).amax(dim=1) / 127)
    alpha = weight.new_zeros(weight.shape[0], -(-weight.shape[1] // group))
    beyond = torch.zeros_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)

    def prepare(first: int, part: Tensor) -> Callable[[Tensor, int], Tensor]:
        size = stored_scale(2 * _mean_size(part, ~chosen[:, first : first + group])) / 2
        alpha[:, first // group] = size

        def replace(column: Tensor, index: int) -> Tensor:
            plus = column >= 0
            codes[:, index] = plus
            sign = torch.where(plus, size, -size)
            beyond[:, index] = nearest_eight(column - sign, step) * step * chosen[:, index]
            return sign + beyond[:, index]

        return replace

    compensated(weight, factor, prepare, group)
    return Binarised(codes, alpha, beyond, step)


def _mean_size(part: Tensor, others: Tensor) -> Tensor:
    """The mean magnitude [o] of part [o, c] over `others`; over all of it where there are none."""
    others = others | ~others.any(dim=1, keepdim=True)
    return (part.abs() * others).sum(dim=1) / others.sum(dim=1)
