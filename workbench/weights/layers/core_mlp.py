"""A gated MLP that decodes with some of its neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.engine.attention_hook import passing
from workbench.weights.layers import CompactLinear

JUDGED = 3000 / 14336  # of an MLP's neurons, how many make up the set by which a text is judged (the authors' code)
_GROUP = "group"  # under which name a run remembers which group its text is of


def votes(activations: Tensor, share: float) -> Tensor:
    """How many tokens have each neuron among their most active ones, float32 [i], plus at most a half by its size.

    activations: [n, i]. share: of the neurons that are positive for a token, on average over the tokens, how many are
    the most active of each; at least one. The half, the neuron's mean positive activation relative to the largest, only
    decides between equal counts.
    """
    sizes = activations.float()
    count = max(int(share * float((sizes > 0).sum()) / sizes.shape[0]), 1)
    chosen = sizes.topk(count, dim=1).indices.flatten()
    counts = torch.zeros(sizes.shape[1], device=sizes.device).index_add_(
        0, chosen, torch.ones(chosen.numel(), device=sizes.device)
    )
    mean = sizes.clamp_min(0).mean(dim=0)
    return counts + 0.5 * mean / mean.max().clamp_min(1e-12)


def chosen_set(counts: Tensor, count: int) -> Tensor:
    """The `count` neurons with the most votes [..., i], as float32 ones among zeros."""
    return torch.zeros_like(counts).scatter_(-1, counts.topk(count, dim=-1).indices, 1.0)


class Groups(nn.Module):
    """The core neurons of groups of texts that are alike.

    neurons: int32 [c, count], of each group, in this MLP. centres: float32 [c, i], the groups' mean sets of core
    neurons, in the one MLP that judges which group a text is of; None in the others.
    """

    def __init__(self, neurons: Tensor, centres: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("neurons", neurons)
        self.register_buffer("centres", centres)

    def of(self, group: Tensor) -> Tensor:
        """The core neurons of this group int64 [], ascending."""
        assert isinstance(self.neurons, Tensor)
        return self.neurons[group].long()

    def judged(self, counts: Tensor) -> Tensor:
        """Which group these votes [i] are nearest to, int64 []."""
        assert isinstance(self.centres, Tensor)
        own = chosen_set(counts, max(int(JUDGED * counts.numel()), 1))
        return (self.centres - own).square().sum(dim=1).argmin()


class CoreMLP(nn.Module):
    """A gated MLP that reads with all neurons, and decodes with those that were most active over what was read.

    What it remembers is in the run's memory, under this module's number: the votes of the tokens read so far, and the
    rows and columns of its core neurons once a token has been decoded. Passes that remember nothing use all neurons.

    groups: the core neurons are those of the group that the MLP with its `centres` finds the text to be of, not those
    with the most votes in this text.
    """

    def __init__(
        self,
        original: Any,
        act_fn: Callable[[Tensor], Tensor],
        number: int,
        token_share: float,
        share: float,
        groups: Groups | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj
        self.act_fn = act_fn
        self.number = number
        self.token_share, self.count = token_share, max(int(share * original.down_proj.in_features), 1)
        self.groups = groups
        self.train(original.training)

    def forward(self, x: Tensor) -> Tensor:
        memory: dict[Any, Any] | None = getattr(passing(), "memory", None)
        votes_key, core_key = ("votes", self.number), ("core", self.number)
        known = votes_key if self.groups is None else _GROUP
        if memory is not None and x.shape[-2] == 1 and known in memory:
            if core_key not in memory:
                kept = self._most(memory[votes_key]) if self.groups is None else self.groups.of(memory[_GROUP])
                memory[core_key] = self._core(kept, x.dtype)
            gate, up, down, gate_bias, up_bias = memory[core_key]
            inside = self.act_fn(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
            return linear(inside, down, self.down_proj.bias)
        inside = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if memory is not None and x.shape[-2] > 1:
            memory.pop(core_key, None)
            if self.groups is None or self.groups.centres is not None:
                counts = votes(inside.flatten(0, -2), self.token_share)
                memory[votes_key] = memory[votes_key] + counts if votes_key in memory else counts
            if self.groups is not None and self.groups.centres is not None:
                memory[_GROUP] = self.groups.judged(memory[votes_key])
        return cast("Tensor", self.down_proj(inside))

    def _most(self, counts: Tensor) -> Tensor:
        """The neurons with the most votes [i], ascending."""
        return counts.topk(self.count).indices.sort().values

    def _core(self, kept: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The rows and columns of these neurons, and their biases."""
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
