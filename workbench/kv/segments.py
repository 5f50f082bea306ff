"""Segments of a text that overlap, and those after which a model is surest of its next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of the distribution that logits [v] give."""
    uncertainty: Tensor = torch.distributions.Categorical(logits=logits.float()).entropy()
    return uncertainty


def overlapping(where: Tensor, size: int, overlap: float) -> list[Tensor]:
    """Positions [n] in segments of `size`, each beginning with the last `overlap` of the one before."""
    step = max(size - int(overlap * size), 1)
    starts = range(0, max(len(where) - (size - step), 1), step)
    return [where[start : start + size] for start in starts]


def surest(segments: Sequence[Tensor], entropies: Tensor, room: int) -> Tensor:
    """The positions, ascending, of the segments with the lowest entropies [s], as many as there is room for."""
    order = entropies.argsort(stable=True).tolist()
    wanted = dict.fromkeys(torch.cat([segments[index] for index in order]).tolist())  # each once, the surest first
    return torch.tensor(list(wanted)[:room]).sort().values
