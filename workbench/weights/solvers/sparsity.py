"""Which weights stay by their scores: the largest of all, of each row, or of each group of neighbours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["unstructured", "2:4", "4:8"]


def groups_of(pattern: Pattern) -> tuple[int, int]:
    """How many weights stay of how many neighbours of a row."""
    kept, of = pattern.split(":")
    return int(kept), int(of)


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores, bool of the same shape; exactly so many, whatever is equal to what."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(count, sorted=False).indices] = True
    return kept.view(scores.shape)


def largest_by_row(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of scores [o, i], as many in each row, and one more where that one is largest."""
    outputs, inputs = scores.shape
    each, over = divmod(count, outputs)
    top = scores.topk(min(each + 1, inputs), dim=1)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, top.indices[:, :each], True)
    if over:
        rows = top.values[:, each].topk(over).indices
        kept[rows, top.indices[rows, each]] = True
    return kept


def largest_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """The largest scores [o, i] of each group of neighbours in a row, as many as the pattern says: bool [o, i]."""
    count, of = groups_of(pattern)
    groups = scores.unflatten(1, (-1, of))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(count, dim=2).indices, True).flatten(1)
