"""Long-term memory in pages on the device, of which a question attends only to those that match it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.kv.stores.store import Store, seen_by
from workbench.kv.stores.wrapping import WrappingStore
from workbench_kernels import Scoring, attend


class PagedStore(WrappingStore):
    """The first `sinks` entries, pages of what is older than position `recent`, and everything since.

    A pass over several tokens is a question: it chooses `share` of the pages, and single tokens that follow attend to
    the same ones. Sinks and everything since `recent` are always attended to. All heads hold the same positions, in
    order.
    """

    retrieves = True

    def __init__(
        self,
        near: Store,
        rotation: Rotation,
        *,
        sinks: int,
        recent: int,
        page: int,
        share: float,
        pages: tuple[int, ...] | None = None,
    ) -> None:
        """rotation: the layer's. pages: those chosen, None before the first pass."""
        super().__init__(near)
        self.rotation = rotation
        self.sinks, self.recent, self.page, self.share = sinks, recent, page, share
        self.pages = pages

    def rebuilt(self, build: Callable[[Store], Store]) -> Store:
        twin = self.clone()
        twin.inner = build(self.inner)
        return twin

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        near = self.inner.contents(query.dtype)
        positions = near.positions[0].long()
        last = int((positions < self.recent).sum())
        numbers = torch.arange(last - self.sinks, device=positions.device) // self.page  # of each long-term slot
        if self.pages is None or query.shape[1] > 1:
            at = query_positions.to(positions.device)
            queries = self.rotation.turned_back(query, at)
            self.pages = self.find(queries, near.keys, positions, numbers, scoring.scale)
        open_ = torch.ones_like(positions, dtype=torch.bool)
        open_[self.sinks : last] = torch.isin(numbers, torch.tensor(self.pages, device=numbers.device))
        causal = seen_by(query_positions, positions[None], None, scoring)
        visible = open_[None, None] if causal is None else causal & open_
        offsets = scoring.offsets(query_positions, positions[None])
        return attend(query, near.keys, near.values, scoring, visible=visible, offsets=offsets, weights=weights)

    def find(self, queries: Tensor, keys: Tensor, positions: Tensor, numbers: Tensor, scale: float) -> tuple[int, ...]:
        """The pages for queries [h, q, d] without rotary embedding; numbers [e]: the page of each long-term slot.

        The attention of the queries to the mean keys of pages, without rotary embedding too, averaged over queries and
        heads.
        """
        if not numbers.numel():
            return ()
        count, (kv_heads, _, width) = int(numbers[-1]) + 1, keys.shape
        part = slice(self.sinks, self.sinks + numbers.numel())
        flat = self.rotation.turned_back(keys[:, part], positions[part])
        sums = torch.zeros(kv_heads, count, width, device=keys.device).index_add_(1, numbers, flat)
        means = sums / numbers.bincount(minlength=count)[:, None]
        rows = queries.unflatten(0, (kv_heads, -1)) @ means[:, None].transpose(2, 3) * scale  # [k, g, q, pages]
        relevance = rows.softmax(dim=-1).mean(dim=(0, 1, 2))
        return tuple(sorted(relevance.topk(math.ceil(self.share * count)).indices.tolist()))

    def clone(self) -> Self:
        sizes = {"sinks": self.sinks, "recent": self.recent, "page": self.page}
        return type(self)(self.inner.clone(), self.rotation, **sizes, share=self.share, pages=self.pages)
