"""Truncated SVD."""

from __future__ import annotations

from typing import Any

from workbench.errors import BadParameter
from workbench.registry import Fidelity, register
from workbench.weights.bases.truncated_svd import TruncatedSVD


@register
class SVD(TruncatedSVD):
    """Replace every weight matrix by the closest product of two thin ones.

    A matrix [o, i] at rank r holds r (o + i) numbers at 16 bits in place of o i; all layers get the largest rank
    within the same share of their bytes. The plain baseline of all low-rank methods: no calibration, the error of the
    weights themselves is the smallest possible (Eckart and Young 1936), that of the outputs is not (`SVDLLM`): the
    default model loses its answers even at 95 % of the bytes. From a share of 1 on the weights stay as they are.
    """

    key = "svd"
    title = "Truncated SVD"
    claim = "what low-rank methods are compared with"
    fidelity = Fidelity("baseline")

    def __init__(self, **values: Any) -> None:
        if "metric" in values:
            raise BadParameter(
                f"{self.key}: the error of the outputs is what svd-llm makes small; there is no metric here"
            )
        super().__init__(**values)
