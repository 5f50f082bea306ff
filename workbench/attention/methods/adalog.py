"""AdaLog."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from workbench.attention.quantised_softmax import QuantisedSoftmax
from workbench.registry import Fidelity, Paper, register

_PARTS = 37  # r: bases are powers of the 37th root of 2
_LARGEST = 128  # q of the largest base, 2 ** (128 / 37), about 11
_SMALLEST = 120  # octaves below 1, beyond which a level would be no float32 any more


@register
class AdaLog(QuantisedSoftmax):
    """Round softmax weights to powers of a base that is searched for each layer.

    Softmax weights are a few large ones and a long tail of small ones. The level of a weight w is b ** -k with
    k = round(-log_b w) and b = 2 ** (q / 37); q is searched (section 3.2), so that levels are close together where
    weights are large, or reach far down into the tail. A level is 2 ** -floor(k q / 37) times a fraction between 1/2
    and 1 from a table, which has `bits` + 1 bits: in integer arithmetic that is a multiplication by the fraction and a
    shift (section 3.3). The last of the 2 ** bits codes is zero, for all weights below the levels; the authors' code
    counts zero besides.

    The paper is on vision transformers and rounds their values, other activations and weights too; here softmax weights
    alone are rounded. Its search over bases and the values' scales together has only bases left.
    """

    key = "adalog"
    title = "AdaLog"
    paper = Paper(
        "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer",
        "Wu et al. 2024",
        "2407.12951",
    )
    claim = "3-bit ViT-B at 37.9 % on ImageNet, where a quantiser of base √2 (RepQ-ViT) falls to 0.1 %"
    fidelity = Fidelity("as published", "the softmax part; the paper rounds weights and other activations too")

    def candidates(self) -> Sequence[Sequence[int]]:
        return [exponents(self.bits)]

    def rounded(self, weights: Tensor, candidate: int) -> Tensor:
        return log_rounded(weights, candidate, self.bits)


def exponents(bits: int) -> range:
    """The q of all bases 2 ** (q / 37) whose levels float32 can hold."""
    return range(1, min(_LARGEST, _SMALLEST * _PARTS // (2**bits - 2)) + 1)


@cache
def log_levels(q: int, bits: int) -> Tensor:
    """The levels of base 2 ** (q / 37), float32 [2 ** bits]: b ** -k for each code k, the last zero."""
    places = torch.arange(2**bits - 1, dtype=torch.float64) * q / _PARTS
    steps = 2 ** (bits + 1) - 2
    fractions = (2 ** -(places % 1) * steps).round() / steps
    return torch.cat([fractions * 2 ** -places.floor(), torch.zeros(1)]).float()


def log_rounded(weights: Tensor, q: int, bits: int) -> Tensor:
    """Weights between 0 and 1 at the levels of base 2 ** (q / 37)."""
    codes = weights.log2().mul_(-_PARTS / q).round_().clamp_(0, 2**bits - 1).int()
    return log_levels(q, bits).to(weights.device).index_select(0, codes.flatten()).view_as(weights)
