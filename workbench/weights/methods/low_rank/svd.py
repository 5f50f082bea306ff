"""Truncated SVD."""

from __future__ import annotations

from workbench.registry import register
from workbench.weights.bases.truncated_svd import TruncatedSVD


@register
class SVD(TruncatedSVD):
    """Replace every weight matrix by the closest product of two thin ones.

    A matrix [o, i] at rank r holds r (o + i) numbers at 16 bits in place of o i; all layers get the largest rank
    within the same share of their bytes. The plain baseline of all low-rank methods: no calibration, the error of the
    weights themselves is the smallest possible (Eckart and Young 1936), that of the outputs is not: the default model
    loses its answers even at 95 % of the bytes. With the metric "outputs" it is: the weight is truncated in coordinates
    in which the layer's inputs over calibration texts are white (SVD-LLM, Wang et al. 2024, arXiv:2403.07378). From a
    share of 1 on the weights stay as they are.
    """

    key = "svd"
    title = "Truncated SVD"
    claim = "what low-rank methods are compared with"
