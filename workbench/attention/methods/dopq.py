"""DopQ-ViT's tangent quantiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention.quantised_softmax import QuantisedSoftmax
from workbench.registry import Fidelity, Paper, register

_CENTRES = (0.0, 0.25, 0.5, 0.75, 1.0)
_STEEP = 24  # how many pieces of the tangent there are for each centre; the last ends 0.0004 before the pole


class Tangent(NamedTuple):
    """A piece of the tangent over [0, 1]: tan(slope * (w - centre)), finite and rising."""

    centre: float
    slope: float

    def of(self, place: float) -> float:
        return math.tan(self.slope * (place - self.centre))


@register
class DopQ(QuantisedSoftmax):
    """Round softmax weights to levels that are equally far apart after a tangent: close together near 1 and near 0.

    Few weights are near 1, but answers hang on them, and powers of a base leave them few levels. The tangent quantiser
    (TanQ) puts a weight w on a line by tan(slope * (w - centre)) and rounds there, evenly from w = 0 to w = 1. The
    nearer the piece of the tangent comes to its poles, the closer are the levels at its ends: at 1 alone with the
    centre at 0, at both ends with the centre between them. Of the paper this takes the tangent in place of the
    logarithm; that slope and centre are searched for each layer, among 24 and 5, is this implementation's choice.

    The other half of the paper, a scaling factor for inputs of linear layers that outlying channels do not spoil
    (MOSF), has no place in attention. The paper is on vision transformers; here softmax weights alone are rounded.
    """

    key = "dopq"
    title = "DopQ-ViT (TanQ)"
    paper = Paper(
        "DopQ-ViT: Towards Distribution-Friendly and Outlier-Aware Post-Training Quantization for Vision Transformers",
        "Yang et al. 2024",
        "2408.03291",
    )
    claim = "keeps the power law of softmax weights better than logarithms do, by looking more at values near 1"
    fidelity = Fidelity(
        "reconstructed from the abstract",
        "the tangent's form, slopes and centres are chosen here; MOSF, which is for inputs of linear layers, is absent",
    )

    def candidates(self) -> Sequence[Sequence[Tangent]]:
        return pieces()

    def rounded(self, weights: Tensor, candidate: Tangent) -> Tensor:
        return tan_rounded(weights, candidate, self.bits)


@cache
def pieces() -> tuple[tuple[Tangent, ...], ...]:
    """Pieces of the tangent for each centre, from nearly straight ones to those that nearly reach a pole."""
    ends = [math.pi / 2 * (1 - 2 ** (-number / 2)) for number in range(1, _STEEP + 1)]
    return tuple(tuple(Tangent(centre, end / max(centre, 1 - centre)) for end in ends) for centre in _CENTRES)


@cache
def tan_levels(piece: Tangent, bits: int) -> Tensor:
    """The levels, float32 [2 ** bits], from 0 to 1: evenly spaced after the tangent."""
    line = torch.linspace(piece.of(0), piece.of(1), 2**bits, dtype=torch.float64)
    levels = line.atan().div_(piece.slope).add_(piece.centre)
    levels[0], levels[-1] = 0, 1
    return levels.float()


def tan_rounded(weights: Tensor, piece: Tangent, bits: int) -> Tensor:
    """Weights between 0 and 1 at the levels that are nearest after the tangent."""
    low, last = piece.of(0), 2**bits - 1
    line = weights.sub(piece.centre).mul_(piece.slope).tan_().sub_(low)
    codes = line.mul_(last / (piece.of(1) - low)).round_().clamp_(0, last).int()
    return tan_levels(piece, bits).to(weights.device).index_select(0, codes.flatten()).view_as(weights)
