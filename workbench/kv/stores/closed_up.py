"""Entries that stand by their place in the cache: closed up wherever others have left."""

from __future__ import annotations

from copy import copy
from typing import Self

import torch
from torch import Tensor

from workbench.core.rope import Rotation
from workbench.errors import NotApplicable
from workbench.kv.stores.capabilities import Evictable, Pin, Replaceable, StateAttention
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, seen_by
from workbench.kv.stores.wrapping import WrappingStore
from workbench_kernels import Scoring, attend
from workbench_kernels.decode import decode_dense
from workbench_kernels.joined import joined
from workbench_kernels.rotary import Turn
from workbench_kernels.rows import Ragged


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

    # -- captured decode steps

    @property
    def replaceable(self) -> Replaceable | None:
        return self if self._alike and self.inner.replaceable is not None else None

    @property
    def _inner(self) -> Replaceable:
        assert self.inner.replaceable is not None
        return self.inner.replaceable

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self._inner.longest

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""
        return self._inner.shortest

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions."""
        return self._inner.placed

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self._inner.growing

    @property
    def beside(self) -> tuple[Rows, Rows]:
        return self._inner.beside

    @property
    def eviction_state(self) -> Tensor:
        """The state of the entry in each slot."""
        return self._inner.eviction_state

    def replace_state(self, state: Tensor) -> None:
        """Replace the eviction state."""
        self._inner.replace_state(state)

    def evict(self, slots: Tensor) -> None:
        """Drop the entries in slots [k, e] of each head."""
        self._inner.evict(slots)

    def advance(self, positions: Tensor) -> None:
        self._inner.advance(positions)

    def captured_state(self, keys: Ragged, values: Ragged, pin: Pin, gone: Tensor | None) -> StateAttention:
        """Where some first entries stay and the oldest behind them leaves each time, all that are recent stand as far
        from a query as they do in the text, and the first as far as they would from one in its place.
        """
        first = self._staying(gone)
        assert gone is not None
        key_rows, value_rows = self.growing
        held, steps = key_rows.longest, len(gone)
        at = int(gone[0, 0]) - first + held + torch.arange(steps, device=self.device)  # where queries stand
        by = self._by(at[None], torch.full_like(at, held - 1)[None])
        cos, sin = (x[0] for x in by)  # [steps, r]
        recent = _behind(keys, first), _behind(values, first)
        sinks = [rows.view()[:, :first].clone() for rows in (key_rows, value_rows)]
        begin, halves = at[:1].clone(), self.rotation.order is None

        def attention(query: Tensor, scoring: Scoring, lse: bool) -> tuple[Tensor, Tensor | None]:
            assert not lse
            near, near_lse = decode_dense(query, *recent, scoring, lse=True)
            if not first:
                return near, None
            assert near_lse is not None
            turn: Turn | None = Turn(cos, sin, pin.position - begin)
            if not halves:
                there = (x.index_select(0, pin.position - begin) for x in (cos, sin))
                query, turn = self.rotation.by(query.float(), *there).to(query.dtype), None
            return joined(near, near_lse, query, sinks[0], sinks[1], scoring, turn), None

        return attention

    def _staying(self, gone: Tensor | None) -> int:
        """How many first entries stay, in the first slots, while the oldest behind them leaves in each step, `gone`.

        Raises NotApplicable where it is otherwise.
        """
        where = self.slots()[0][0].long()
        held, ordered = where.numel(), where.sort().values.cpu()
        leave = None if gone is None or not gone.numel() else gone[:, 0].cpu()
        if leave is not None:
            last = int(ordered[-1])
            first = int(leave[0]) - (last + 1 - held)
            begin = int(leave[0])
            expected = torch.cat([torch.arange(first), torch.arange(begin, last + 1)])
            stay = where[:first].cpu()
            if (
                torch.equal(ordered, expected)
                and torch.equal(leave, begin + torch.arange(len(leave)))
                and torch.equal(stay, torch.arange(first))
            ):
                return first
        raise NotApplicable("entries leave from the midst of those that close up")

    def _by(self, positions: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines that turn from positions to `place`, [k or 1, n, r]."""
        cos, sin = self.rotation(positions.long())
        to_cos, to_sin = self.rotation(place)
        size = cos.square() + sin.square()  # 1, or what YaRN and LongRoPE scale by
        return (to_cos * cos + to_sin * sin) / size, (to_sin * cos - to_cos * sin) / size

    def _turned(self, x: Tensor, positions: Tensor, place: Tensor) -> Tensor:
        """x [k, n, d], which was turned to positions [k or 1, n], turned to `place` [k or 1, n] instead."""
        return self.rotation.by(x.float(), *self._by(positions, place)).to(x.dtype)

    def clone(self) -> Self:
        twin = copy(self)
        twin.inner = self.inner.clone()
        return twin


def _behind(rows: Ragged, first: int) -> Ragged:
    """Rows without the first so many of each head."""
    return Ragged(rows.data, rows.starts + first, rows.lengths - first, rows.longest - first)


def places(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Each entry's place among those of its head, by positions [k or 1, m]: int64 [k or 1, m], from 0 on.

    valid [k, m]: which slots hold an entry; None: all. What holds none stands behind all that do.
    """
    if valid is not None:
        positions = positions.masked_fill(~valid, torch.iinfo(positions.dtype).max)
    order = positions.argsort(dim=1, stable=True)
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, steps)
