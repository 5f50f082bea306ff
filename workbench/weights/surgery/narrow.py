"""Modules of a transformer with fewer dimensions inside, and the same inputs and outputs."""

from __future__ import annotations

from torch import Tensor, nn


def narrowed(linear: nn.Linear, kept: Tensor, axis: int) -> nn.Linear:
    """A layer with only the outputs (axis 0) or inputs (axis 1) `kept` int64 [m] of this one."""
    weight = linear.weight.detach().index_select(axis, kept.to(linear.weight.device))
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if linear.bias is not None:
        made.bias = linear.bias if axis else nn.Parameter(linear.bias.detach()[kept.to(weight.device)].clone(), False)
    return made.train(linear.training)
