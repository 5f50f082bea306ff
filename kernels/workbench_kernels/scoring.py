"""How an attention layer makes scores of the products of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scoring:
    """A score is scale * q k, bent to softcap * tanh(score / softcap) if there is a softcap; rows see a window.

    All that attends, on any device, takes these three as one value.
    """

    scale: float
    """what products are multiplied with, most often d ** -0.5"""
    window: int | None = None
    """how many positions a query sees, its own included; None: all up to its own"""
    softcap: float | None = None
    """the bound of scores (Gemma 2); None: unbounded"""

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled scores of any shape, bent by the softcap; themselves where there is none."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def scores(self, products: Tensor, visible: Tensor | None = None) -> Tensor:
        """Scores of products q k [..., m], float32 or wider, which are overwritten: scaled, capped and masked.

        visible: bool, broadcastable to [..., m]; minus infinity stands where it is False. None: everything is seen.
        """
        scores = self.cap(products.mul_(self.scale))
        return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)

    def visible(self, query_positions: Tensor, positions: Tensor) -> Tensor:
        """Whether queries at query_positions int [q] see keys at positions int [..., m]: bool [..., q, m]."""
        keys, queries = positions[..., None, :], query_positions[:, None]
        seen = keys <= queries
        return seen if self.window is None else seen & (keys > queries - self.window)
