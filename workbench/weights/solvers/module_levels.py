"""A module at each of the widths that it may have: how long it takes, and what stands for it while that is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from workbench.progress import Progress
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.solvers.latency import ProductTimes
from workbench.weights.solvers.structure_removal import Removal, removal
from workbench.weights.surgery.prunable import PrunableModule

_ROUNDS = 64  # in how many steps at least the structures of a head go: several at once where there are many


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


def removals_of(
    modules: Sequence[PrunableModule],
    levels: Sequence[Sequence[int]],
    linears: Mapping[str, nn.Linear],
    study: WeightStudy,
    damping: float,
    progress: Progress,
) -> dict[str, Removal]:
    """In which order each module's structures go, by its name, and what that costs at each of its widths."""
    widths = {module.name: set(row) for module, row in zip(modules, levels, strict=True)}
    found: dict[str, Removal] = {}
    for _, inputs in study.inputs(hessians=True, progress=progress):
        for module in (module for module in modules if module.out in inputs):
            progress.update("finding what costs least", len(found), len(modules))
            each = torch.arange(module.width).expand(module.heads, -1)
            structures = module.columns(each).view(module.heads, -1, module.width).transpose(1, 2)  # [heads, width, c]
            hessian = inputs[module.out].hessian
            found[module.name] = removal(
                linears[module.out].weight.detach(), hessian, structures.to(hessian.device), damping,
                max(module.width // _ROUNDS, 1), widths[module.name],
            )  # fmt: skip
    return found


def errors_of(
    modules: Sequence[PrunableModule], levels: Sequence[Sequence[int]], removals: Mapping[str, Removal]
) -> Tensor:
    """What each module loses at each of its widths [u, v]."""
    rows = zip(modules, levels, strict=True)
    return torch.stack([removals[x.name].errors[[x.width - width for width in row]] for x, row in rows])


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
