"""Linear layers as two thin ones, and feed-forward modules that never hold all their activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.core.precision import checked, sixteen
from workbench.weights.layers.compact import CompactLinear
from workbench.weights.solvers.whitening import root, solved
from workbench_kernels.dispatch import on_gpu
from workbench_kernels.lowrank import ACTIVATIONS, mlp_factors


class LowRankLinear(CompactLinear):
    """A linear layer whose weight [o, i] is up [o, r] times down [r, i], both held at 16 bits."""

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(down.shape[1], up.shape[0], bias)
        self.register_buffer("down", sixteen(down, "its factors"))
        self.register_buffer("up", sixteen(up.to(down.dtype), "its factors"))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.up[first:last].to(dtype) @ self.down.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), self.bias)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "rank": self.rank}


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product is the closest to weight [o, i] of all of that rank, at its dtype.

    The singular values are shared out evenly, so that both fit into 16 bits.
    """
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = values[:rank].sqrt()
    return in_precision(weight, root[:, None] * right[:rank], left[:, :rank] * root)


def whitened(weight: Tensor, rank: int, moment: Tensor) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product changes the outputs of weight [o, i] least of all of that rank, in the
    mean square over inputs of this second moment [i, i].
    """
    base = root(moment)
    down, up = truncated(weight.detach().float() @ base, rank)
    return in_precision(weight, solved(down, base), up)


def row_weighted(weight: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """down [r, i] and up [o, r] whose product is the closest of that rank to weight [o, i] where the squared error of
    each row counts by rows [o], positive.
    """
    factor = (rows / rows.mean()).sqrt()[:, None]
    down, up = truncated(factor * weight.detach().float(), rank)
    return in_precision(weight, down, up / factor)


def in_precision(weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the precision of the weight that they stand for."""
    return checked(down, weight.dtype, "its factors"), checked(up, weight.dtype, "its factors")


class StreamedMLP(nn.Module):
    """A gated feed-forward module of low-rank layers, computed tile by tile (see `workbench_kernels.lowrank`).

    On a CPU, act(gate(x)) * up(x) exists for `tile` tokens and `tile` neurons at a time; what each tile adds to the
    module's output is summed in the low-rank space of the last layer. The numbers are those of the layers one after
    another. Raises ValueError where `activation_name` knows no name for act_fn.
    """

    def __init__(
        self, gate_proj: LowRankLinear, up_proj: LowRankLinear, down_proj: LowRankLinear, act_fn: Any, tile: int
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


def activation_name(act_fn: Any) -> str | None:
    """Which of the activations that can be computed tile by tile gives the same numbers; None: none of them."""
    if not callable(act_fn) or (isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters())):
        return None
    x = torch.linspace(-6, 6, 97)
    found = act_fn(x)
    return next((name for name, act in ACTIVATIONS.items() if torch.allclose(found, act(x), rtol=0, atol=1e-6)), None)
