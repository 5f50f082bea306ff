"""Tensors of several layers, which need not lie on one device, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of equal shapes along a new first axis, on the device of the first.

    Raises RuntimeError where there are none or their shapes differ, as torch.stack does.
    """
    return torch.stack([x.to(tensors[0].device) for x in tensors] if tensors else [])
