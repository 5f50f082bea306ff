"""Which entries stay if some places go by score and the others are spread over the text."""

from __future__ import annotations

import torch
from torch import Tensor


def bucketed(scores: Tensor, positions: Tensor, start: int, end: int, places: int, retention: float) -> Tensor:
    """Vision sink bucketing with one place a bucket: which of the entries [e] stay, bool [e].

    scores and positions [e], within start <= position < end; places: how many stay.
    """
    order = scores.argsort(descending=True, stable=True)
    buckets = (positions[order] - start) * places // (end - start)
    # Of each bucket the best is the first in order; `rank` counts those before it in the same one.
    grouped = buckets.argsort(stable=True)
    starts = torch.searchsorted(buckets[grouped], buckets[grouped])
    rank = torch.empty_like(grouped).scatter_(0, grouped, torch.arange(len(grouped), device=grouped.device) - starts)
    safe = torch.arange(len(order), device=order.device) < int(retention * places)
    # Those that go by score, then those that find their bucket empty, then the rest; each by score.
    turn = torch.where(safe, 0, torch.where(rank == 0, 1, 2))
    chosen = order[turn.argsort(stable=True)[:places]]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, chosen, True)
