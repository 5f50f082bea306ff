"""Modules of a transformer with fewer dimensions inside, and the same inputs and outputs."""

from __future__ import annotations

from torch import Tensor, nn


def linear_like(layer: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A plain layer with this weight [o, i] and bias, in the mode of another; a parameter is shared, not copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    made.register_parameter("bias", bias)
    return made.train(layer.training)


def narrowed(linear: nn.Linear, kept: Tensor, axis: int) -> nn.Linear:
    """A layer with only the outputs (axis 0) or inputs (axis 1) `kept` int64 [m] of this one."""
    weight = linear.weight.detach().index_select(axis, kept.to(linear.weight.device)).contiguous()
    bias = linear.bias
    if bias is not None and axis == 0:
        bias = nn.Parameter(bias.detach()[kept.to(weight.device)].clone(), requires_grad=False)
    return linear_like(linear, weight, bias)
