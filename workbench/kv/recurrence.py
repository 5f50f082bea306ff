"""When tokens recur, as LazyEviction remembers it, and how much each is due to matter again."""

from __future__ import annotations

import torch
from torch import Tensor


def mri_score(memory: Tensor) -> Tensor:
    """How much a token is due to matter, float32 [k, m], from its steps since and MRI, memory [k, m, 2]."""
    since, interval = memory.unbind(dim=-1)
    overdue = 2 * torch.sigmoid(-1 - since / (interval + 1e-5))
    often = torch.where(interval > 0, 2 * torch.sigmoid(1 - interval), 0.0)
    return overdue + often


def track_recurrence(memory: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """The memory [k, m, 2] after steps with attention weights [k, q, m]: steps since each token recurred, and its MRI.

    A token that a query cannot see yet, and that was never seen before, has not come into being: its steps begin with
    the first query that sees it.
    """
    since, interval = memory.unbind(dim=-1)
    steps = weights.shape[1]
    now = torch.arange(1, steps + 1, device=weights.device, dtype=memory.dtype)[:, None]  # [q, 1]
    visible = weights > 0
    unborn = (since == 0) & (interval == 0)  # [k, m]; also what came into being with the step before, which is the same
    birth = torch.where(visible.any(dim=1), visible.to(torch.uint8).argmax(dim=1), steps)
    start = torch.where(unborn, birth.to(memory.dtype), -since)  # when each last recurred, or the step before its first
    recurs = visible & (weights >= threshold)
    last = torch.where(recurs, now, start[:, None]).cummax(dim=1).values  # [k, q, m]
    before = torch.cat([start[:, None], last[:, :-1]], dim=1)
    longest = torch.where(recurs, now - before, 0).amax(dim=1)
    return torch.stack([steps - last[:, -1], torch.maximum(interval, longest)], dim=-1)
