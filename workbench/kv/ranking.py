"""Scores put in order once, so that every budget is a comparison."""

from __future__ import annotations

from copy import copy
from functools import cached_property

import torch
from torch import Tensor


def for_all_heads(scores: Tensor) -> Tensor:
    """Scores [..., k, n] of entries that all heads share: the mean over these, float32 [..., 1, n]."""
    return scores.float().mean(dim=-2, keepdim=True)


class Ranking:
    """Scores [l, k, n] of the compressible layers, and their order.

    Equal scores are put in order of position, later ones first, so the same plan comes out every time.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores.float()
        self.layers, self.kv_heads, self.tokens = scores.shape
        self.importance: Tensor | None = None

    def beside(self, importance: Tensor | None) -> Ranking:
        """The same order, with what an allocator goes by besides."""
        if importance is None:
            return self
        twin = copy(self)
        twin.importance = importance
        return twin

    @cached_property
    def in_head(self) -> Tensor:
        """Each entry's place among its head's, 0 the best: int32 [l, k, n]."""
        return places(self.scores)

    @cached_property
    def certain(self) -> Tensor:
        """How many entries of each head stay in any case: int64 [l, k], on the CPU."""
        return (self.scores == torch.inf).sum(dim=-1).cpu()

    @cached_property
    def in_layer(self) -> Tensor:
        """The places of each head's entries, best first, among all entries of their layer: int [l, k, n], ascending.

        Equal scores of different heads take turns, so that no head is served before the others. On the CPU: a few of
        them are looked up for every size that is tried, and each look at a device would be waited for.
        """
        best_first = self.scores.gather(-1, _order(self.scores)).transpose(1, 2).flatten(1)  # [l, n * k]
        order = torch.argsort(best_first, dim=-1, descending=True, stable=True)
        whole = torch.int32 if order.shape[1] < 2**31 else torch.int64
        steps = torch.arange(order.shape[1], dtype=whole, device=order.device).expand_as(order)
        place = torch.empty_like(order, dtype=whole).scatter_(-1, order, steps)
        return place.view(self.layers, self.tokens, self.kv_heads).transpose(1, 2).contiguous().cpu()

    @cached_property
    def in_all(self) -> Tensor:
        """The places of each head's entries, best first, among all entries of all layers: int [l, k, n], ascending.

        Equal scores of different heads take turns here too. On the CPU.
        """
        together = Ranking(self.scores.reshape(1, -1, self.tokens))
        return together.in_layer.view(self.layers, self.kv_heads, self.tokens)

    def selected(self, counts: Tensor) -> Tensor:
        """The best counts [l, k] entries of each head, bool [l, k, n]."""
        return self.in_head < counts[..., None]


def _order(scores: Tensor) -> Tensor:
    last = scores.shape[-1] - 1
    return last - torch.argsort(scores.flip(-1), dim=-1, descending=True, stable=True)


def places(scores: Tensor) -> Tensor:
    """Each entry's place among scores [..., n], 0 the best; of equals the later comes first. int32 [..., n]."""
    order = _order(scores)
    steps = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand_as(order)
    return torch.empty_like(steps.contiguous()).scatter_(-1, order, steps)
