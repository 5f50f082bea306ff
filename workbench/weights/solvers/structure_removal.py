"""Structured second-order pruning: in which order the structures inside a module go, and what stays makes up for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.weights.solvers.least_squares import damped


@dataclass(frozen=True)
class Removal:
    """In which order the dimensions of a module go, int64 [heads, width], and what that costs, float64 [width + 1].

    errors[m]: the change of the module's outputs once m dimensions of each head are gone, of the outputs' mean square.
    weights: of some widths, what is left of the weight there, brought up to date, at 16 bits [o, heads * width * c];
    its columns stand in the order in which they did.
    """

    order: Tensor
    errors: Tensor
    weights: Mapping[int, Tensor]


def removal(
    weight: Tensor, hessian: Tensor, columns: Tensor, damping: float, together: int = 1, keep: Collection[int] = ()
) -> Removal:
    """Leave out structures of a weight [o, i] one after another, each time those that cost least, until none is left.

    columns: int64 [heads, width, c], the inputs that make up each structure; one of every head goes in each step, or
    `together` of them. keep: the widths of which the weight is kept. The cost of a structure S is
    tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ); what stays makes up for it, W and H⁻¹ are brought up to date (Kurtic et al. 2023,
    arXiv:2302.04089, equations 2 and 3, algorithm 1). hessian: the mean of x xᵀ [i, i], damped as `refitted` does.
    """
    left = weight.double().clone()
    whole = damped(hessian, damping)
    inverse = torch.linalg.inv(whole)
    scale = float(((left @ whole) * left).sum().clamp_min(1e-30))
    heads, width, _ = columns.shape
    present = torch.ones(heads, width, dtype=torch.bool, device=columns.device)
    order: list[Tensor] = []
    errors = [0.0]
    weights: dict[int, Tensor] = {}
    stops = sorted({0, *(other for other in keep if 0 < other < width)})
    while (now := width + 1 - len(errors)) > 0:
        costs = _costs(left, inverse, columns).masked_fill(~present, torch.inf)
        while stops[-1] >= now:
            stops.pop()
        count = min(together, now - stops[-1])
        chosen = costs.topk(count, dim=1, largest=False).indices  # [heads, count]
        gone = columns.gather(1, chosen[..., None].expand(-1, -1, columns.shape[2])).flatten()
        pivot = torch.linalg.inv(inverse[gone][:, gone])
        cost = float(((left[:, gone] @ pivot) * left[:, gone]).sum()) / scale
        rows = inverse[gone]
        left.addmm_(left[:, gone] @ pivot, rows, alpha=-1)
        inverse.addmm_(rows.T @ pivot, rows, alpha=-1)
        left[:, gone] = 0
        inverse[gone], inverse[:, gone] = 0, 0
        inverse[gone, gone] = 1  # so that what is gone can be inverted, and costs nothing
        present.scatter_(1, chosen, False)
        order.append(chosen)
        errors += [errors[-1] + cost * (step + 1) / count for step in range(count)]
        if now - count in keep and now > count:
            weights[now - count] = left[:, columns[present].flatten().sort().values].bfloat16()
        if 0 < 1.3 * int(present.sum()) * columns.shape[2] < left.shape[1]:
            left, inverse, columns = _compacted(left, inverse, columns, present)
    return Removal(torch.cat(order, dim=1), torch.tensor(errors, dtype=torch.double), weights)


def _compacted(left: Tensor, inverse: Tensor, columns: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without the columns that are gone; structures that are gone point to one of their head that is not."""
    alive = columns[present].flatten().sort().values
    places = torch.zeros(left.shape[1], dtype=torch.long, device=columns.device)
    places[alive] = torch.arange(len(alive), device=columns.device)
    some = columns.gather(1, present.int().argmax(dim=1)[:, None, None].expand(-1, 1, columns.shape[2]))
    columns = places[torch.where(present[..., None], columns, some)]
    return left[:, alive], inverse[alive][:, alive].contiguous(), columns


def _costs(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """What each structure costs, [heads, width]."""
    if columns.shape[2] == 1:
        flat = columns[..., 0]
        return weight.square().sum(dim=0)[flat] / inverse.diagonal()[flat]
    pivots = inverse[columns[..., :, None], columns[..., None, :]]  # [heads, width, c, c]
    part = weight.T[columns]  # [heads, width, c, o]
    costs: Tensor = (torch.linalg.solve(pivots, part) * part).sum(dim=(-1, -2))
    return costs
