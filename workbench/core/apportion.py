"""Dividing a whole number of entries by weights, exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def apportion(total: int, weights: Tensor, most: Tensor) -> Tensor:
    """Whole shares of `total` in proportion to weights [...], none above its `most` [...]: int64 [...] on the CPU.

    What would exceed the most goes to the others in proportion; the shares add up to `total`, or to all of `most`
    where that is less. Among equal remainders earlier places come first. Weights that are all zero count as equal.
    """
    weight = weights.detach().double().cpu().flatten().clamp_min(0)
    most = most.detach().long().cpu().flatten()
    total = min(max(total, 0), int(most.sum()))
    shares = torch.zeros_like(weight)
    full = most <= 0
    while not bool(full.all()):
        left = total - int(most[full].clamp_min(0).sum())
        open_weight = torch.where(full, 0.0, weight)
        if not float(open_weight.sum()) > 0:
            open_weight = (~full).double()
        shares = left * open_weight / open_weight.sum()
        over = ~full & (shares > most)
        if not bool(over.any()):
            break
        full |= over
    shares = torch.where(full, most.clamp_min(0).double(), shares)
    whole = shares.floor().long()
    spare = total - int(whole.sum())
    while spare > 0:  # the largest remainders first, where there is room
        remainder = torch.where(whole < most, shares - whole, -torch.inf)
        order = torch.argsort(remainder, descending=True, stable=True)[: min(spare, int((whole < most).sum()))]
        whole[order] += 1
        spare -= order.numel()
    return whole.view(weights.shape)
