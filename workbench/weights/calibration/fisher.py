"""The Fisher information of weights, from gradients over calibration texts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GradientStats:
    """The Fisher information of a weight [o, i]: mean squares of its gradients over the texts, summed along its sides.

    rows: for each output [o]; columns: for each input [i]; float32.
    """

    rows: Tensor
    columns: Tensor
