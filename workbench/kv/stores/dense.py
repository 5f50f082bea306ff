"""Plain stores: every head equally long (dense), each with a length of its own (ragged), or a sliding window."""

from __future__ import annotations

from ctypes import CDLL
from typing import Self

import torch
from torch import Tensor

from workbench.core.precision import appended
from workbench.kv.stores.capabilities import (
    Capturable,
    CapturedAttention,
    Droppable,
    Evictable,
    Part,
    Pin,
    Place,
    Replaceable,
    Rewritable,
    StateAttention,
)
from workbench.kv.stores.positioned import PositionedStore, positions_where
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, for_kernel, state
from workbench_kernels import Scoring
from workbench_kernels.building import kept
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged


class DenseStore(PositionedStore):
    """Keys and values at one precision, with a number of positions per KV head that is data.

    A store that holds everything from position 0 needs no positions; any other keeps them as int32 per entry. `state`,
    one float32 per entry or a few, is by what methods evict while decoding.
    """

    def __init__(self, keys: Rows, values: Rows, positions: Rows | None, state: Rows | None = None) -> None:
        super().__init__(positions)
        self.keys, self.values, self.state = keys, values, state

    @classmethod
    def where(
        cls,
        keys: Tensor,
        values: Tensor,
        keep: Tensor,
        dtype: torch.dtype,
        state: Tensor | None = None,
        *,
        positions: bool = False,
    ) -> DenseStore:
        """The entries of keys [k, n, d], values [k, n, dv], state [k, n] or [k, n, w] at which keep [k, n] is True.

        positions: hold them even where all are kept.
        """
        where = Rows.positions(kept(keep)) if positions or state is not None else positions_where(keep)
        return cls(
            Rows.where(keys, keep, dtype),
            Rows.where(values, keep, dtype),
            where,
            None if state is None else Rows.where(state.view(*state.shape[:2], -1), keep, torch.float32),
        )

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, keep: Tensor, dtype: torch.dtype) -> DenseStore:
        """The same, of entries that stand at positions [k or 1, n]."""
        where = positions.expand(keys.shape[0], -1)[..., None]
        return cls(Rows.where(keys, keep, dtype), Rows.where(values, keep, dtype), Rows.where(where, keep, torch.int32))

    @property
    def kv_heads(self) -> int:
        return self.keys.heads

    @property
    def device(self) -> torch.device:
        return self.keys.data.device

    @property
    def entries(self) -> int:
        return self.keys.total

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self.keys.longest

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""
        return self.keys.shortest

    @property
    def _complete_length(self) -> int:
        return self.keys.longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.keys.view().to(dtype), self.values.view().to(dtype)

    # -- evicting while decoding

    @property
    def evictable(self) -> Evictable | None:
        return self if self.state is not None else None

    @property
    def droppable(self) -> Droppable | None:
        return self if self._positions else None

    @property
    def rewritable(self) -> Rewritable | None:
        return self

    def rewrite(self, keys: Tensor, values: Tensor) -> None:
        """Replace keys [k, m, d] and values [k, m, dv], laid out as `contents` shows them."""
        self.keys.write(keys)
        self.values.write(values)

    @property
    def eviction_state(self) -> Tensor:
        """The eviction state of the entry in each slot, float32 [k, m], or [k, m, w] where it is w > 1 numbers."""
        assert self.state is not None
        rows = self.state.view()
        return rows[..., 0] if rows.shape[-1] == 1 else rows

    def replace_state(self, state: Tensor) -> None:
        """Replace the eviction state, laid out as `eviction_state` shows it."""
        assert self.state is not None
        self.state.write(state.view(*state.shape[:2], -1))

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)
        self._append_positions(positions)
        if self.state is not None:
            self.state.append(torch.zeros(*keys.shape[:2], self.state.data.shape[1], device=keys.device))

    def evict(self, slots: Tensor) -> None:
        """Drop the entries in slots [k, e] of each head; the last entries move into the freed slots."""
        count = slots.shape[1]
        if count == 1:
            last = self.keys.counts[:, None] - 1
            for rows in self._rows:
                rows.move(last, slots, 1)
            return
        heads, device = slots.shape[0], slots.device
        # Of the last `count` slots of a head, those that stay fill those freed before them.
        ends = self.keys.counts[:, None] - count + torch.arange(count, device=device)  # [k, e]
        first = ends[:, :1]
        freed_at_end = torch.zeros(heads, count + 1, dtype=torch.bool, device=device)
        freed_at_end.scatter_(1, torch.where(slots >= first, slots - first, count), True)
        freed_at_end = freed_at_end[:, :count]
        stays = torch.argsort(freed_at_end.to(torch.uint8), dim=1, stable=True)  # staying end slots first
        holes = torch.argsort((slots >= first).to(torch.uint8), dim=1, stable=True)  # holes before the end first
        # As many stay at the end as were freed before it; whatever is paired behind them is cut anyway.
        source, target = ends.gather(1, stays), slots.gather(1, holes)
        for rows in self._rows:
            rows.move(source, target, count)

    @property
    def _rows(self) -> list[Rows]:
        """All rows of an entry."""
        return [self.keys, self.values, *self._positions, *(() if self.state is None else (self.state,))]

    def reserve(self, tokens: int) -> None:
        for rows in self._rows:
            rows.reserve(tokens)

    # -- captured decode steps

    @property
    def capturable(self) -> Capturable | None:
        return self if self.state is None else None

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.keys, self.values

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        return [(rows, steps) for rows in self._rows]

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self.keys.longest + steps, self.values.longest + steps

    @property
    def fixed_nbytes(self) -> int:
        return 0

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return None

    def settle(self) -> None:
        """Nothing waits."""

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        return lambda query, scoring: decode_dense(query, keys, values, scoring)[0]

    parted = True

    def part(self, dtype: torch.dtype, more: int, pin: Place) -> Part:
        keys, values = (pin(rows, rows.longest + more) for rows in self.growing)
        return whole_rows(keys, values)

    def growing_part(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> Part:
        return whole_rows(keys, values)

    def advance(self, positions: Tensor) -> None:
        self._grown(self.growing, positions)

    @property
    def replaceable(self) -> Replaceable | None:
        return self if self.state is not None and self._positions else None

    @property
    def beside(self) -> tuple[Rows, Rows]:
        assert self.state is not None
        return self._positions[0], self.state

    def captured_state(self, keys: Ragged, values: Ragged, pin: Pin, gone: Tensor | None) -> StateAttention:
        return lambda query, scoring, lse: decode_dense(query, keys, values, scoring, lse=lse)

    @property
    def in_place(self) -> tuple[Ragged, Ragged]:
        return self.keys.ragged(), self.values.ragged()

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        state = self.state_by_kernel(query, query_positions, scoring, lse=False)
        return None if state is None else state[0]

    def state_by_kernel(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, lse: bool = True
    ) -> tuple[Tensor, Tensor | None] | None:
        """The output of `attend` and its log-sum-exp [h, q], to merge it with what others hold; None where there is no
        kernel.
        """
        fits, asked = for_kernel(query, self.keys.data, query_positions, scoring)
        if not fits:
            return None
        return decode_dense(
            query,
            self.keys.ragged(),
            self.values.ragged(),
            scoring,
            query_positions=asked,
            positions=self._ragged_positions,
            lse=lse,
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        return {_name(self.keys.data.dtype): [tensor for rows in self._rows for tensor in rows.tensors()]}

    def clone(self) -> Self:
        twin = super().clone()
        twin.keys, twin.values = self.keys.clone(), self.values.clone()
        twin.state = None if self.state is None else self.state.clone()
        return twin


def whole_rows(keys: Ragged, values: Ragged) -> Part:
    """Attention over rows at full precision."""
    return lambda query, scoring: state(decode_dense(query, keys, values, scoring, lse=True))


class SlidingStore(Store):
    """The last `window` positions of a sliding-window layer, exact.

    While they follow one another, the end says them all; where some were never read, positions are held as int32.
    """

    def __init__(self, keys: Tensor, values: Tensor, end: int, window: int, scattered: Tensor | None = None) -> None:
        """keys [k, m, d], values [k, m, dv] of the positions before `end`, or at positions `scattered` [m]."""
        self.keys, self.values, self.end, self.window = keys, values, end, window
        self._scattered = scattered
        self._for_others = False

    def keep_for_others(self) -> None:
        """What has left the window goes only when the next token comes, for other layers attend after this one."""
        self._for_others = True

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, window: int, dtype: torch.dtype) -> SlidingStore:
        """The window's part of keys [k, n, d] and values [k, n, dv]."""
        kept = [x[:, -window:].to(dtype, copy=True).contiguous() for x in (keys, values)]
        return cls(kept[0], kept[1], keys.shape[1], window)

    @property
    def reach(self) -> int:
        return self.window

    @property
    def sliding_window(self) -> int:
        return self.window

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return self._positions[None], None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        begin, last = positions[[0, -1]].tolist()
        # Tokens read together still need the window of the first of them: the rest is cut once they have attended.
        self._cut(self._sees(begin))
        if self._scattered is not None or begin != self.end or last - begin + 1 != positions.numel():
            self._scattered = torch.cat([self._positions, positions.to(self.keys.device)]).to(torch.int32)
        self.keys = torch.cat([self.keys, appended(keys, self.keys.dtype, "new keys")], dim=1)
        self.values = torch.cat([self.values, appended(values, self.values.dtype, "new values")], dim=1)
        self.end = last + 1

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        attended = super().attend(query, query_positions, scoring, weights=weights)
        self.attended()
        return attended

    def attended(self, library: CDLL | None = None) -> None:
        """Let go of what no later query sees."""
        if not self._for_others and self._cut(self._sees(self.end - 1)):
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def _sees(self, position: int) -> int:
        """The first position that a query at this one sees."""
        return position - self.window + 1

    def _cut(self, begin: int) -> bool:
        """Forget the positions before `begin`; whether there were any."""
        count = self.keys.shape[1]
        if self._scattered is None:
            first = min(max(begin - (self.end - count), 0), count)
        else:
            first = int((self._scattered < begin).sum())
            rest = self._scattered[first:]
            follow = rest.numel() == 0 or self.end - int(rest[0]) == rest.numel()
            self._scattered = None if follow else rest.clone()
        self.keys, self.values = self.keys[:, first:], self.values[:, first:]
        return first > 0

    @property
    def _positions(self) -> Tensor:
        """Of all that is held, int64 [m]."""
        if self._scattered is not None:
            return self._scattered.long()
        return torch.arange(self.end - self.keys.shape[1], self.end, device=self.keys.device)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        return Dequantised(self.keys.to(dtype), self.values.to(dtype), self._positions[None], None)

    def tensors(self) -> dict[str, list[Tensor]]:
        tensors = [self.keys, self.values] if self._scattered is None else [self.keys, self.values, self._scattered]
        return {_name(self.keys.dtype): tensors}

    def clone(self) -> Self:
        scattered = None if self._scattered is None else self._scattered.clone()
        return type(self)(self.keys.clone(), self.values.clone(), self.end, self.window, scattered)


class ChunkStore(SlidingStore):
    """The newest positions of a layer that attends in chunks of `window`, exact: those of the chunk of the last one.

    Tokens of several chunks come one chunk after the other (`Decoder.feed`).
    """

    @property
    def newest_chunk(self) -> int:
        return self.window

    def _sees(self, position: int) -> int:
        return position - position % self.window


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
