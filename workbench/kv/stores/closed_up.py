"""Entries that stand by their place in the cache: closed up wherever others have left."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.kv.stores.capabilities import Evictable
from workbench.kv.stores.store import Dequantised, Store, seen_by
from workbench.kv.stores.wrapping import WrappingStore
from workbench_kernels import Scoring, attend


class ClosedUpStore(WrappingStore):
    """Another store's entries, attended to as if they stood one after another from position 0 on.

    Keys are held as the model turned them, at whatever precision, and turned on from their true position to their place
    when they are attended to; queries likewise, to the place behind what their head holds of earlier positions. So no
    rounding adds up, any store will do whose contents may be attended to, and however long a text is, no distance is
    larger than the cache. Positions stay true everywhere else: masks and evictions go by them.
    """

    def __init__(self, inner: Store, rotation: Rotation, *, together: bool) -> None:
        """together: heads that hold the same positions will always do, for nothing leaves but by its position."""
        super().__init__(inner)
        self.rotation = rotation
        where, valid = inner.slots()
        self._alike = together and valid is None and bool((where == where[:1]).all())

    @property
    def attends_itself(self) -> bool:
        return True  # whoever else attended would have to turn the queries

    @property
    def evictable(self) -> Evictable | None:
        return self.inner.evictable

    def contents(self, dtype: torch.dtype) -> Dequantised:
        """Everything held, with keys turned to their places."""
        held = self.inner.contents(dtype)
        where = held.positions
        if self._alike:
            where = where[:1]  # one table for all heads
        keys = self._turned(held.keys, where, places(where, held.valid))
        return Dequantised(keys, held.values, held.positions, held.valid)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        held = self.contents(query.dtype)
        asked = query_positions.to(held.keys.device)
        before = held.positions[:, None] < asked[:, None]  # [k or 1, q, m]
        if held.valid is not None:
            before = before & held.valid[:, None]
        place = before.sum(dim=2).expand(held.keys.shape[0], -1)  # [k, q]
        groups = query.shape[0] // held.keys.shape[0]
        query = self._turned(query, asked[None], place.repeat_interleave(groups, dim=0))
        visible = seen_by(asked, held.positions, held.valid, scoring)
        offsets = scoring.offsets(asked, held.positions)
        return attend(query, held.keys, held.values, scoring, visible=visible, offsets=offsets, weights=weights)

    def _turned(self, x: Tensor, positions: Tensor, place: Tensor) -> Tensor:
        """x [k, n, d], which was turned to positions [k or 1, n], turned to `place` [k or 1, n] instead."""
        cos, sin = self.rotation(positions.long())
        to_cos, to_sin = self.rotation(place)
        size = cos.square() + sin.square()  # 1, or what YaRN and LongRoPE scale by
        cos, sin = (to_cos * cos + to_sin * sin) / size, (to_sin * cos - to_cos * sin) / size
        return self.rotation.by(x.float(), cos, sin).to(x.dtype)

    def clone(self) -> Self:
        twin = copy(self)
        twin.inner = self.inner.clone()
        return twin


def places(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Each entry's place among those of its head, by positions [k or 1, m]: int64 [k or 1, m], from 0 on.

    valid [k, m]: which slots hold an entry; None: all. What holds none stands behind all that do.
    """
    if valid is not None:
        positions = positions.masked_fill(~valid, torch.iinfo(positions.dtype).max)
    order = positions.argsort(dim=1, stable=True)
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, steps)
