"""A module at each of the widths that it may have: how long it takes, and what stands for it while that is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.weights.solvers.latency import ProductTimes
from workbench.weights.solvers.structure_removal import Removal
from workbench.weights.surgery.prunable import PrunableModule


def module_times(
    modules: Sequence[PrunableModule],
    levels: Sequence[Sequence[int]],
    linears: Mapping[str, nn.Linear],
    times: ProductTimes,
) -> Tensor:
    """How long each module's layers take at each of its widths, never longer when narrower; float64 [u, v]."""
    rows = []
    for module, widths in zip(modules, levels, strict=True):
        total = torch.zeros(len(widths), dtype=torch.float64)
        for name, (axis, heads) in module.layers.items():
            shape = linears[name].weight.shape
            sizes = [(heads * width, shape[1]) if axis == 0 else (shape[0], heads * width) for width in widths]
            total += torch.tensor([times.of(*size) for size in sizes], dtype=torch.float64)
        rows.append(total.cummin(dim=0).values)
    return torch.stack(rows)


class Selected(nn.Module):
    """A linear layer [o, m] on some of its inputs, as a trial stands in for the narrow module."""

    def __init__(self, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.kept, self.weight, self.bias = kept, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x[..., self.kept], self.weight.to(x.dtype), self.bias)


def kept_of(module: PrunableModule, found: Removal, width: int) -> Tensor:
    """Which dimensions of each head stay, ascending, int64 [heads, width]."""
    return found.order[:, module.width - width :].sort(dim=1).values


def stand_ins(
    modules: Sequence[PrunableModule],
    levels: Sequence[Sequence[int]],
    removals: Mapping[str, Removal],
    linears: Mapping[str, nn.Linear],
) -> list[dict[str, nn.Module]]:
    """At each level, what stands for the layer behind what was pruned, by its name."""
    made: list[dict[str, nn.Module]] = [{} for _ in levels[0]]
    for module, widths in zip(modules, levels, strict=True):
        out, found = linears[module.out], removals[module.name]
        for level, width in enumerate(widths):
            if width == module.width:
                made[level][module.out] = out
                continue
            columns = module.columns(kept_of(module, found, width)).to(out.weight.device)
            made[level][module.out] = Selected(columns, found.weights[width], out.bias)
    return made
