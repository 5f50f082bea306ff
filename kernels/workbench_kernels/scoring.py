"""How an attention layer makes scores of the products of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Which positions an indexer chose for each query of a pass (sparse attention); no other is seen.

    queries int64 [q]: where the queries stand, ascending. keys int [q, c]: what was chosen for each, in any order, later
    positions among them where there were too few; None: everything. All heads see the same.
    """

    queries: Tensor
    keys: Tensor | None

    @property
    def most(self) -> int | None:
        """How many keys a query sees at most; None: everything."""
        return None if self.keys is None else self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.keys is None else self.keys.nbytes

    def to(self, device: torch.device) -> Chosen:
        """The same on another device."""
        return Chosen(self.queries, None if self.keys is None else self.keys.to(device))

    def visible(self, query_positions: Tensor, positions: Tensor) -> Tensor | None:
        """Whether positions int [..., m] were chosen for the queries at query_positions int [q]: bool [..., q, m].

        None: everything was. Raises ValueError for queries of another pass.
        """
        if self.keys is None:
            return None
        asked = query_positions.to(self.queries.device)
        rows = torch.searchsorted(self.queries, asked).clamp_max(len(self.queries) - 1)
        if not torch.equal(self.queries[rows], asked):
            raise ValueError("what an indexer chose is known of the queries of its own pass only")
        keys = self.keys[rows.to(self.keys.device)].to(positions.device).long()  # [q, c]
        size = 1 + max(int(x.max()) if x.numel() else 0 for x in (keys, positions))
        table = torch.zeros(len(keys), size, dtype=torch.bool, device=keys.device).scatter_(1, keys, True)
        return table[:, positions.clamp_min(0).long()].movedim(0, -2)


@dataclass(frozen=True, slots=True)
class Scoring:
    """A score is scale * q k, bent to softcap * tanh(score / softcap) if there is a softcap; rows see a window.

    All that attends, on any device, takes these as one value.
    """

    scale: float
    """what products are multiplied with, most often d ** -0.5"""
    window: int | None = None
    """how many positions a query sees, its own included; None: all up to its own"""
    softcap: float | None = None
    """the bound of scores (Gemma 2); None: unbounded"""
    chosen: Chosen | None = None
    """what of that an indexer chose for each query (DeepSeek-V3.2); None: there is no indexer"""

    @property
    def plain(self) -> bool:
        """Whether a row sees all that its window shows; kernels know no other rows."""
        return self.chosen is None

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
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        chosen = None if self.chosen is None else self.chosen.visible(query_positions, positions)
        return seen if chosen is None else seen & chosen
