"""DenseShift."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.registry import Fidelity, Paper, param, register
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.layers import ShiftLinear
from workbench.weights.solvers.quantisation_grid import stored_scale

_STARTS = tuple(2 ** (-step / 4) for step in range(6))  # of the largest magnitude: scales that are tried first
_ROUNDS = 3


@register
class DenseShift(Quantiser):
    """Round every weight to a signed power of two times its group's scale; no weight is zero.

    With n bits a weight is ± 2 ** -k, k from 0 to 2 ** (n - 1) - 1: multiplying is shifting, and a code for zero would
    only cost one of the few levels (zero-free shifting, section 3.1 of the paper). The paper trains such networks from
    the start, with signs and shifts as parameters of their own. Here weights that are there are rounded: each goes to
    the nearest level, and each group's scale to the one that errs least for these levels, in turns; of six starts,
    from the largest magnitude down to 0.4 of it, the best stays. What counts is the squared error of each weight
    times the mean square of its input. The paper has no scales inside a layer; here each group of columns has one of 16
    bits, as all quantisers here do.

    Levels lie close together near zero and an octave apart at the top. On workbench-tiny and the default model they
    change a layer's outputs less than even levels do (`rtn`) at 3 bits, where no level goes to zero, and more at 4,
    where most of the eight octaves are below all that matters. What they save besides is multiplying.
    """

    key = "denseshift"
    title = "DenseShift"
    paper = Paper(
        "DenseShift: Towards Accurate and Efficient Low-Bit Power-of-Two Quantization", "Li et al. 2022", "2208.09708"
    )
    claim = "networks trained so are as accurate as at full precision; dot products 1.6 times faster on an ARM CPU"
    fidelity = Fidelity("untrained part of a trained method", "weights that are there are rounded, none is trained")
    needs_inputs: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True  # type: ignore[misc]  # no choice here

    bits: Literal[2, 3, 4] = param(
        4, help="bits of each weight: its sign and its shift", own="the paper trains at several; at fewer more is lost"
    )

    def compress(self, linear: nn.Linear, inputs: InputStats | None = None) -> ShiftLinear:
        assert inputs is not None
        group = self.group(linear)
        codes, scale = shifts(linear.weight.detach().float(), inputs.square, self.bits, group)
        return ShiftLinear(codes, scale, self.bits, linear.bias, group=group)


def shifts(weight: Tensor, square: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [o, i] and scales [o, g] of signed powers of two near weight [o, i].

    square: what the squared error counts in each column [i]; where it is zero in a whole group, all columns count
    alike there. The scales are as float16 holds them, and the codes are the nearest for these.
    """
    columns = weight.shape[1]
    blocks = pad(weight, (0, -columns % group)).unflatten(1, (-1, group))  # [o, g, c]
    counts = pad(square.float(), (0, -columns % group)).view(-1, group)  # [g, c]
    inside = pad(torch.ones_like(square), (0, -columns % group)).view(-1, group)
    counts = torch.where(counts.sum(dim=1, keepdim=True) > 0, counts, inside)
    sizes, largest = blocks.abs(), blocks.abs().amax(dim=-1)
    last = 2 ** (bits - 1) - 1
    best, least = stored_scale(largest), torch.full_like(largest, torch.inf)
    for start in _STARTS:
        scale = stored_scale(largest * start)
        for _ in range(_ROUNDS):
            level = torch.exp2(-shift_of(sizes / scale[..., None], last))
            error = (counts * (level * scale[..., None] - sizes).square()).sum(dim=-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
            weighted = counts * level
            scale = stored_scale((weighted * sizes).sum(dim=-1) / (weighted * level).sum(dim=-1))
    shift = shift_of(sizes / best[..., None], last)
    codes = shift.add_((blocks < 0) * (last + 1.0)).to(torch.uint8)
    return codes.flatten(1)[:, :columns], best


def shift_of(size: Tensor, last: int) -> Tensor:
    """The k from 0 to `last` for which 2 ** -k is nearest to each size, as float32.

    Between 2 ** -k and half of it, the middle is 1.5 times that half: the bounds are the powers of two times 1.5.
    """
    return (size / 1.5).log2_().neg_().floor_().clamp_(0, last)
