"""Gated feed-forward modules of low-rank layers that never hold all their activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.weights.layers.low_rank import LowRankLinear
from workbench_kernels.dispatch import on_gpu
from workbench_kernels.lowrank import ACTIVATIONS, mlp_factors


class StreamedMLP(nn.Module):
    """A gated feed-forward module of low-rank layers, computed tile by tile (see `workbench_kernels.lowrank`).

    On a CPU, act(gate(x)) * up(x) exists for `tile` tokens and `tile` neurons at a time; what each tile adds to the
    module's output is summed in the low-rank space of the last layer. The numbers are those of the layers one after
    another. Raises ValueError where `activation_name` knows no name for act_fn.
    """

    def __init__(
        self, gate_proj: LowRankLinear, up_proj: LowRankLinear, down_proj: LowRankLinear, act_fn: object, tile: int
    ) -> None:
        super().__init__()
        name = activation_name(act_fn)
        if name is None:
            raise ValueError(
                f"{type(act_fn).__name__} cannot be computed tile by tile: none of {', '.join(ACTIVATIONS)}"
            )
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act, self.tile = name, tile

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # [n, i]
        out = flat.new_empty(flat.shape[0], self.down_proj.up.shape[0])
        rows = max(flat.shape[0], 1) if on_gpu(flat) else self.tile  # a GPU needs many rows, and tiles them itself
        for first in range(0, flat.shape[0], rows):
            part = slice(first, first + rows)
            out[part] = self._rows(flat[part])
        return out.view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        """The output of some tokens x [t, i]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        mixed = mlp_factors(
            linear(x, gate.down.to(x.dtype)), linear(x, up.down.to(x.dtype)), gate.up.T, up.up.T, down.down.T,
            act=self.act, gate_bias=gate.bias, up_bias=up.bias, tile=self.tile,
        )  # fmt: skip
        return linear(mixed, down.up.to(x.dtype), down.bias)


def activation_name(act_fn: object) -> str | None:
    """Which of the activations that can be computed tile by tile gives the same numbers; None: none of them."""
    if not callable(act_fn) or (isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters())):
        return None
    x = torch.linspace(-6, 6, 97)
    out = act_fn(x)
    return next((name for name, act in ACTIVATIONS.items() if torch.allclose(out, act(x), rtol=0, atol=1e-6)), None)
