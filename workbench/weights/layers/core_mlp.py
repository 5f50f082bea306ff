"""A gated MLP that decodes with some of its neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.engine.attention_hook import passing
from workbench.weights.layers import CompactLinear


def votes(activations: Tensor, share: float) -> Tensor:
    """How many tokens have each neuron among their most active ones, float32 [i], plus at most a half by its size.

    activations: [n, i]. share: of all neurons, which are the most active of a token (by magnitude); at least one. The
    half, the neuron's mean magnitude relative to the largest, only decides between equal counts.
    """
    sizes = activations.float().abs()
    count = max(int(share * sizes.shape[1]), 1)
    chosen = sizes.topk(count, dim=1).indices.flatten()
    counts = torch.zeros(sizes.shape[1], device=sizes.device).index_add_(
        0, chosen, torch.ones(chosen.numel(), device=sizes.device)
    )
    mean = sizes.mean(dim=0)
    return counts + 0.5 * mean / mean.max().clamp_min(1e-12)


class CoreMLP(nn.Module):
    """A gated MLP that reads with all neurons, and decodes with those that were most active over what was read.

    What it remembers is in the run's memory, under this module's number: the votes of the tokens read so far, and the
    rows and columns of its core neurons once a token has been decoded. Passes that remember nothing use all neurons.
    """

    def __init__(
        self, original: Any, act_fn: Callable[[Tensor], Tensor], number: int, token_share: float, share: float
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj
        self.act_fn = act_fn
        self.number = number
        self.token_share, self.count = token_share, max(int(share * original.down_proj.in_features), 1)
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        memory: dict[Any, Any] | None = getattr(passing(), "memory", None)
        votes_key, core_key = ("votes", self.number), ("core", self.number)
        if memory is not None and x.shape[-2] == 1 and votes_key in memory:
            if core_key not in memory:
                memory[core_key] = self._core(memory[votes_key], x.dtype)
            gate, up, down, gate_bias, up_bias = memory[core_key]
            inside = self.act_fn(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
            return linear(inside, down, self.down_proj.bias)
        inside = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if memory is not None and x.shape[-2] > 1:
            counts = votes(inside.flatten(0, -2), self.token_share)
            memory[votes_key] = memory[votes_key] + counts if votes_key in memory else counts
            memory.pop(core_key, None)
        return cast("Tensor", self.down_proj(inside))

    def _core(self, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The rows and columns of the neurons with the most votes, and their biases."""
        kept = counts.topk(self.count).indices.sort().values
        biases = (layer.bias for layer in (self.gate_proj, self.up_proj))
        gate, up, down = (_weight(layer, dtype) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        return (
            gate[kept],
            up[kept],
            down[:, kept].contiguous(),
            *(None if bias is None else bias[kept] for bias in biases),
        )


def _weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer, also of one that was quantised since."""
    return layer.dequantised(dtype) if isinstance(layer, CompactLinear) else cast("Tensor", layer.weight)
