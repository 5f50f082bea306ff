"""Pages of consecutive entries, judged by the least and the greatest number of each channel of their keys."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.format import Shape, index_nbytes
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.selected import Selection, Selector
from workbench.trace import LayerTrace
from workbench_kernels.pages import page_rows, page_scores
from workbench_kernels.rows import Ragged


@dataclass(frozen=True)
class PageSelection(Selection):
    """The `pages` best pages of `page` entries for each query head, in all layers from number `dense` on.

    dtype: of the bounds.
    """

    dtype: torch.dtype
    page: int
    pages: int
    dense: int

    def nbytes(self, shape: Shape, held: Tensor) -> int:
        if shape.layer < self.dense:
            return 0
        pages = -(-held // self.page)
        return int(pages.sum()) * 2 * shape.key_width * self.dtype.itemsize + index_nbytes(pages)

    def build(self, layer: LayerTrace, held: Tensor) -> Selector | None:
        if layer.index < self.dense:
            return None
        counts = held.sum(dim=1)  # [k]
        bounds = bounds_of(layer.keys, held, self.page)
        pages = -(-counts // self.page)
        there = torch.arange(bounds.shape[1], device=held.device) < pages[:, None]
        return PageBounds(Rows.where(bounds, there, self.dtype), counts, self.page, self.pages)


def bounds_of(keys: Tensor, held: Tensor, page: int) -> Tensor:
    """The least and the greatest number of each channel of the keys [k, n, d] of every page: [k, p, 2d].

    Pages are `page` consecutive of the entries at which held [k, n] is True; a head with fewer pages has some that mean
    nothing.
    """
    most = -(-int(held.sum(dim=1).max()) // page)
    number = ((held.cumsum(dim=1) - 1) // page).masked_fill(~held, most)[..., None].expand_as(keys)
    ends = []
    for reduce, begin in (("amin", torch.inf), ("amax", -torch.inf)):
        bounds = keys.new_full((len(keys), most + 1, keys.shape[2]), begin)
        ends.append(bounds.scatter_reduce_(1, number, keys, reduce)[:, :most])
    return torch.cat(ends, dim=2)


class PageBounds(Selector):
    """The bounds [p, 2d] of the pages of each head.

    A page's score is the largest product that a key within its bounds could have with the query: the sum over channels
    of the larger of query * least and query * greatest. While all heads are equally long, new tokens fill up the last
    page; otherwise they begin pages of their own.
    """

    def __init__(self, bounds: Rows, counts: Tensor, page: int, pages: int) -> None:
        """counts int64 [k]: entries of each head now."""
        self.bounds, self.page, self.pages = bounds, page, pages
        lengths = counts.tolist()
        self._padding = [0 if len(set(lengths)) == 1 else -length % page for length in lengths]
        self._begun = lengths
        self._filled = lengths[0] % page if len(set(lengths)) == 1 else 0  # entries in the page that grows

    def choose(self, query: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        least, greatest = self.bounds.view().float().chunk(2, dim=2)  # [k, p, d]
        highest = query.clamp_min(0) @ greatest.mT + query.clamp_max(0) @ least.mT  # [k, g, p]
        if any(self._padding):
            begun, padding = (torch.tensor(x, device=order.device)[:, None] for x in (self._begun, self._padding))
            order = torch.where(order < begun, order, order + padding)
        page = order // self.page  # [k, m]
        page = page.clamp_max(least.shape[1] - 1)  # slots that hold nothing come last
        open_ = torch.zeros_like(highest[:, 0], dtype=torch.uint8).scatter_reduce_(
            1, page, seen.to(torch.uint8), "amax"
        )
        highest = highest.masked_fill(open_[:, None] == 0, -torch.inf)
        best = highest.argsort(dim=2, descending=True, stable=True)[..., : self.pages]
        picked = torch.zeros_like(highest, dtype=torch.bool).scatter_(2, best, True)
        return picked.gather(2, page[:, None].expand(-1, query.shape[1], -1)) & seen[:, None]

    @property
    def looks_at(self) -> int:
        return self.bounds.total

    def append(self, keys: Tensor) -> None:
        room = -self._filled % self.page
        joining, rest = keys[:, :room], keys[:, room:]
        if joining.shape[1]:
            last = self.bounds.counts[:, None] - 1
            before = self.bounds.at(last)
            self.bounds.put(last, _joined(before, _bounds(joining)))
        for page in rest.split(self.page, dim=1) if rest.shape[1] else ():
            self.bounds.append(_bounds(page), block=4)
        self._filled = (self._filled + keys.shape[1]) % self.page

    # -- captured decode steps

    @property
    def growing(self) -> Rows | None:
        return self.bounds if self.bounds.uniform and not any(self._padding) else None

    def room_for(self, tokens: int) -> int:
        return tokens // self.page + 1

    def captured(self, keys: Ragged, values: Ragged) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        most = -(-keys.longest // self.page)
        wanted = min(self.pages, most)
        bounds = self.bounds.data.view(self.bounds.heads, -1, self.bounds.data.shape[1])[:, :most]  # [k, p, 2d]

        def choose(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            best = page_scores(query, keys, bounds, self.page).topk(wanted, dim=2).indices
            return page_rows(best, keys, values, self.page)

        return choose

    def follow(self, keys: Tensor, count: int) -> int:
        total, before = keys.shape[1], keys.shape[1] - count
        first = before // self.page
        self.bounds.grow(-(-total // self.page) - self.bounds.longest)
        part = keys[:, first * self.page :]
        rest = part[:, -1:].expand(-1, -total % self.page, -1)  # which widens nothing
        pages = torch.cat([part, rest], dim=1).unflatten(1, (-1, self.page))
        where = torch.arange(first, self.bounds.longest, device=keys.device).expand(len(keys), -1)
        self.bounds.put(where, torch.cat([pages.amin(dim=2), pages.amax(dim=2)], dim=2))
        self._filled = total % self.page
        return self.bounds.heads * sum(-(-length // self.page) for length in range(before + 1, total + 1))

    def reserve(self, tokens: int) -> None:
        self.bounds.reserve(-(-tokens // self.page))

    def tensors(self) -> list[Tensor]:
        return self.bounds.tensors()

    def clone(self) -> Self:
        twin = copy(self)
        twin.bounds = self.bounds.clone()
        return twin


def _bounds(keys: Tensor) -> Tensor:
    """Those of one page of keys [k, e, d], [k, 1, 2d]."""
    return torch.cat([keys.amin(dim=1, keepdim=True), keys.amax(dim=1, keepdim=True)], dim=2)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The bounds [k, 1, 2d] of two pages taken together."""
    (low, high), (other_low, other_high) = first.chunk(2, dim=2), second.chunk(2, dim=2)
    return torch.cat([torch.minimum(low, other_low), torch.maximum(high, other_high)], dim=2)
