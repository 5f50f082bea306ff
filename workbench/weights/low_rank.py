"""Linear layers as two thin ones, and feed-forward modules that never hold all their activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class LowRankLinear(nn.Module):
    """A linear layer whose weight [o, i] is up [o, r] times down [r, i], both held at 16 bits.

    bias: the original's own, shared.
    """

    down: Tensor
    up: Tensor
    bias: nn.Parameter | None

    def __init__(self, down: Tensor, up: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        dtype = down.dtype if down.dtype.itemsize == 2 else torch.float16
        self.register_buffer("down", down.to(dtype, copy=True).contiguous())
        self.register_buffer("up", up.to(dtype, copy=True).contiguous())
        self.register_parameter("bias", bias)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.down.shape[1]}, out_features={self.up.shape[0]}, rank={self.rank}"


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product is the closest to weight [o, i] of all of that rank, at its dtype.

    The singular values are shared out evenly, so that both fit into 16 bits.
    """
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).to(weight.dtype), (left[:, :rank] * root).to(weight.dtype)


class StreamedMLP(nn.Module):
    """A gated feed-forward module of low-rank layers, computed tile by tile.

    act(gate(x)) * up(x) exists for `rows` tokens and `columns` neurons at a time; what each tile adds to the module's
    output is summed in the low-rank space of the last layer. The numbers are those of the layers one after another.
    """

    def __init__(
        self, gate_proj: LowRankLinear, up_proj: LowRankLinear, down_proj: LowRankLinear, act_fn: Any, tile: int
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn, self.tile = act_fn, tile

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # [n, i]
        out = flat.new_empty(flat.shape[0], self.down_proj.up.shape[0])
        for rows in torch.arange(flat.shape[0], device=x.device).split(self.tile):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            out[part] = self._rows(flat[part])
        return out.view(*x.shape[:-1], -1)

    def _rows(self, x: Tensor) -> Tensor:
        """The output of a few tokens x [t, i]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        thin_gate, thin_up = linear(x, gate.down.to(x.dtype)), linear(x, up.down.to(x.dtype))  # [t, r]
        mixed = x.new_zeros(x.shape[0], down.rank)
        neurons = gate.up.shape[0]
        for first in range(0, neurons, self.tile):
            some = slice(first, min(first + self.tile, neurons))
            opened = self.act_fn(linear(thin_gate, gate.up[some].to(x.dtype), _part(gate.bias, some)))
            passed = opened * linear(thin_up, up.up[some].to(x.dtype), _part(up.bias, some))
            mixed += linear(passed, down.down[:, some].to(x.dtype))
        return linear(mixed, down.up.to(x.dtype), down.bias)


def _part(bias: Tensor | None, some: slice) -> Tensor | None:
    return None if bias is None else bias[some]
