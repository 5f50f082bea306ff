"""Which entries of all heads of a layer stay, in one order of their scores."""

from __future__ import annotations

import torch
from torch import Tensor


def most_attended(rows: Tensor) -> Tensor:
    """Scores [k, m] of entries by attention rows [k, g, q, m]: the largest share that any query pays to each."""
    shares = rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return shares.amax(dim=(1, 2))


def with_sinks(scores: Tensor, positions: Tensor, sinks: int) -> Tensor:
    """The same scores [k, m], of at most 1, with the first `sinks` positions above all, the earlier the higher."""
    return torch.where(positions < sinks, 2.0 + sinks - positions, scores)


def best(scores: Tensor, count: int, *, equal: bool) -> Tensor:
    """The `count` highest of scores [k, m] over all heads, but one of each head at least; bool [k, m].

    equal: as many of each head.
    """
    heads, slots = scores.shape
    if equal:
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : count // heads]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
    scores = scores.scatter(1, scores.argmax(dim=1, keepdim=True), torch.inf)
    chosen = scores.flatten().argsort(descending=True, stable=True)[:count]
    return (
        torch.zeros(heads * slots, dtype=torch.bool, device=scores.device).index_fill_(0, chosen, True).view(heads, -1)
    )
