"""One list of entries for each KV head, from those that the query heads of its group found."""

from __future__ import annotations

import torch
from torch import Tensor


def united(slots: Tensor, counts: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """What any query head of a KV head's group found, once each.

    slots int64 [k, g * q, c] and which of them count, bool; returns slots [k, q, g * c] and which of those count.
    """
    heads, _, each = slots.shape
    none = torch.iinfo(slots.dtype).max
    slots = slots.masked_fill(~counts, none).view(heads, -1, queries, each)
    slots = slots.transpose(1, 2).flatten(2).sort(dim=2).values  # [k, q, g * c]
    counts = slots < none
    counts[..., 1:] &= slots[..., 1:] != slots[..., :-1]
    return slots.masked_fill(~counts, 0), counts
