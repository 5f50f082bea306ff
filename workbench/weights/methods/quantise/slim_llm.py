"""SliM-LLM: more bits for groups of columns that matter, fewer for as many that do not."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from workbench.core.precision import half
from workbench.registry import Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import CompactLinear, PackedLinear, Parts, packed_nbytes
from workbench.weights.solvers.compensation import removal_cost
from workbench.weights.solvers.gptq import Rounded, gptq
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid, fit, fit_least, squares, stored_scale

_SHRINKS = (1.0, 1.03, 1.06, 1.1, *(1 - step / 25 for step in range(1, 13)))  # of a range


def bits_exchanged(losses: Tensor, salience: Tensor) -> Tensor:
    """How many bits more than usual each group of columns gets, int64 [g]: -1, 0 or 1, of both as many.

    Two pointers move inwards over the groups in the order of their salience [g]: the least salient gives a bit to the
    most salient, then the next pair, up to half of all groups. That number of pairs is taken at which the losses are
    least in total. losses: of each group with one bit less, as usual, and with one more [3, g].
    """
    groups = len(salience)
    order = salience.argsort(stable=True)
    low, high = order[: groups // 2], order.flip(0)[: groups // 2]
    gained = (losses[1] - losses[0])[low] + (losses[1] - losses[2])[high]  # by each pair
    pairs = int(torch.cat([gained.new_zeros(1), gained.cumsum(0)]).argmax())
    more = torch.zeros_like(order)
    more[low[:pairs]], more[high[:pairs]] = -1, 1
    return more


def binary(weight: Tensor, group: int) -> Grid:
    """The grid of one bit for each group of weight [o, i]: the mean plus and minus the mean distance from it."""
    rows = weight.float().unflatten(1, (-1, group))
    mean = rows.mean(dim=-1)
    distance = (rows - mean[..., None]).abs().mean(dim=-1)
    scale = stored_scale(2 * distance)
    return Grid(scale, half(0.5 - mean / scale, "its zeros").float(), 1, group)


def salient_grid(weight: Tensor, factor: Tensor, bits: int) -> Grid:
    """The grid of one group [o, c], from half its range to a tenth more than that, at which its salience suffers least.

    A weight's error counts by 1 / [H⁻¹] of its column, which makes of w² what removing the weight would cost. (Section
    3.3 of the paper parts the weights at three standard deviations of their salience and then adds the squared errors
    of both parts, which is plain least squares, within a tenth of the range on either side.) factor: the inverse
    Hessian's columns for this group [i, c].
    """
    if bits == 1:
        return binary(weight, weight.shape[1])
    roots = factor.square().sum(dim=0).rsqrt()
    return fit_least(weight, bits, weight.shape[1], _SHRINKS, lambda change: squares(change * roots, weight.shape[1]))


@register
class SliMLLM(Quantiser):
    """Give the most salient groups of columns a bit more, as many of the least salient a bit less, and round by GPTQ.

    The salient weights shape the grids.
    Which groups exchange a bit is found layer by layer on weights rounded to nearest, by how much of each column's
    error the columns after it cannot make up for: summed, that is what GPTQ changes in the layer's outputs. (The paper
    compares outputs of rounded layers by their Kullback-Leibler divergence, for which it has to keep outputs.) Groups
    of equal bits are one part of the layer, and say which columns they have. A shorter last group keeps the usual bits.
    At 2 bits the less salient groups have one: a mean, and a distance from it. Hessians are those of the uncompressed
    model.
    """

    key = "slim-llm"
    title = "SliM-LLM"
    paper = Paper(
        "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large Language Models",
        "Huang et al. 2024",
        "2405.14917",
    )
    claim = "LLaMA-7B at 2 bits: perplexity 48 % lower than other methods without gradients"
    needs_hessian = True
    symmetric: ClassVar[bool] = False  # type: ignore[misc]  # no choice here

    bits: Literal[2, 3, 4] = param(3, help="bits of each weight on average")
    damping: float = param(0.01, gt=0, le=1, help="added to the Hessian's diagonal, as a share of its mean")

    def nbytes(self, linear: nn.Linear) -> int:
        out_features, in_features, group = linear.out_features, linear.in_features, self.group(linear)
        places = (2 if in_features <= 2**15 else 4) * in_features  # which columns each part takes
        wider = out_features * (in_features // group // 2) if self.bits == 2 else 0  # zeros of one-bit groups: 16 bits
        return packed_nbytes(out_features, in_features, self.bits, group, zero_bytes=1) + places + wider

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> CompactLinear:
        assert inputs is not None
        weight, hessian, group = linear.weight.detach().float(), inputs.hessian, self.group(linear)
        factor = inverse_factor(hessian, self.damping)
        bits = self.bits + self._exchanged(weight, factor, group)  # [g], the last group's too
        done = gptq(
            weight,
            hessian,
            lambda part, number: salient_grid(
                part, factor[:, number * group : (number + 1) * group], int(bits[number])
            ),
            group,
            damping=self.damping,
        )
        owners = torch.arange(weight.shape[1], device=weight.device) // group
        used = bits.unique().tolist()
        if len(used) == 1:
            return self._part(done, bits, owners, self.bits, linear.bias)
        parts = [self._part(done, bits, owners, width, None) for width in used]
        columns = [(bits == width)[owners].nonzero()[:, 0] for width in used]
        return Parts(parts, columns, weight.shape[1], linear.bias)

    def _exchanged(self, weight: Tensor, factor: Tensor, group: int) -> Tensor:
        """How many bits more than usual each group gets [g], also a shorter last one."""
        whole = weight.shape[1] // group
        weight, pivots = weight[:, : whole * group], factor.diagonal()[: whole * group]
        matters = removal_cost(weight, pivots).unflatten(1, (whole, group)).sum(dim=(0, 2))
        losses = []
        for bits in range(self.bits - 1, self.bits + 2):
            grid = binary(weight, group) if bits == 1 else fit(weight, bits, group)
            losses.append(squares((grid.nearest(weight) - weight) / pivots, group).sum(dim=0))
        more = bits_exchanged(torch.stack(losses), matters)
        return torch.cat([more, more.new_zeros(-(-len(factor) // group) - whole)])

    def _part(self, done: Rounded, bits: Tensor, owners: Tensor, width: int, bias: nn.Parameter | None) -> PackedLinear:
        """The groups of this many bits."""
        groups = bits == width  # [g]
        zero = done.zero[:, groups]
        return PackedLinear(
            done.codes[:, groups[owners]],
            done.scale[:, groups],
            zero if width == 1 else zero.to(torch.uint8),
            width,
            bias,
            group=int(owners.eq(0).sum()),
        )
