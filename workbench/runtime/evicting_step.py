"""Layers whose entries leave by an eviction state, in captured steps: the new row takes the place of one that leaves.

Where a method lets one entry go for each that comes (H2O, TOVA, StreamingLLM), it is chosen within the step, and a full
cache stays as it is but for that row. Where several leave at once (LazyEviction), rows come as long as there is room,
and who leaves goes between steps. Both write over what they cannot put back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod
from workbench.kv.stores.capabilities import CapturedAttention, Pin, Replaceable
from workbench.kv.stores.rows import Rows
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged
from workbench_kernels.shares import shares


class EvictingLayer:
    """A store as `Capturable`, with the method that evicts, and the entries of a head that it holds at most."""

    def __init__(self, store: Replaceable, evicting: KVMethod, capacity: int) -> None:
        """Raises NotApplicable where entries cannot be told apart on the device alone."""
        if store.longest != store.shortest:
            raise NotApplicable(f"{evicting.key} evicts from heads of unequal length")
        self.store, self.evicting, self.capacity = store, evicting, capacity
        self.replaces = self._leaving().shape[1] == 1
        if self.replaces and store.longest < capacity:
            raise NotApplicable("the cache is not full yet")
        self._watches = type(evicting).update_state is not KVMethod.update_state

    def _leaving(self) -> Tensor:
        """The slots [k, e] that leave for the next token."""
        return self.evicting.evict(self.store.eviction_state, self.store.slots()[0], 1)

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.store.growing

    @property
    def changed(self) -> list[Tensor]:
        """What a step writes over."""
        return [rows.data for rows in (*self.store.growing, *self.store.beside)]

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        return [(rows, self.capacity - rows.longest) for rows in (*self.store.growing, *self.store.beside)]

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self.capacity, self.capacity

    @property
    def fixed_nbytes(self) -> int:
        return 0

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return None if self.replaces else max(self.capacity - self.store.longest, 0)

    def settle(self) -> None:
        """Let those leave that would before the next token."""
        if not self.replaces and self.store.longest >= self.capacity:
            self.store.evict(self._leaving())

    def take_in(self, position: Tensor, key_ends: Tensor, value_ends: Tensor) -> None:
        """Know of the token at `position` int64 [1] before its key and value come to rows `key_ends` and `value_ends`
        [k], which this says where it replaces.
        """
        keys, values = self.store.growing
        where, state = self.store.beside
        if self.replaces:
            seen, heads = self._seen(where)[..., 0], keys.heads
            slot = self.evicting.evict(self._state(), seen, 1)[:, 0]  # [k]
            key_ends.copy_(keys.begins + slot)
            value_ends.copy_(values.begins + slot)
            where.data.index_copy_(0, where.begins + slot, position.to(torch.int32).expand(heads)[:, None])
        else:
            slot = key_ends - keys.begins
        state.data.index_fill_(0, state.begins + slot, 0.0)

    def _seen(self, rows: Rows) -> Tensor:
        """Rows [k, capacity, w] of every head, as far as there will be any."""
        return rows.data.view(rows.heads, -1, rows.data.shape[1])[:, : self.capacity]

    def _state(self) -> Tensor:
        state = self._seen(self.store.beside[1])
        return state[..., 0] if state.shape[2] == 1 else state

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        attention = self.store.captured_state(keys, values, pin)

        def attended(query: Tensor, scoring: Scoring) -> Tensor:
            out, lse = attention(query, scoring, self._watches)
            if self._watches:
                assert lse is not None
                state = self._state()
                state.copy_(self.evicting.update_state(state, shares(query, keys, lse, scoring)))
            return out

        return attended

    def advance(self, positions: Tensor) -> None:
        if not self.replaces:
            self.store.advance(positions)
            self.store.beside[1].grow(positions.numel())
