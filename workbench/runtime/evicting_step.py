"""Layers whose entries leave in captured steps: the new row takes the place of one that leaves.

Where a method lets one entry go for each that comes, a full cache stays as it is but for that row. Which one is chosen
within the step (H2O, TOVA), or known beforehand where positions alone decide (StreamingLLM, PrefixKV). Where several
leave at once (LazyEviction), rows come as long as there is room, and who leaves goes between steps. All write over what
they cannot put back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod
from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Pin, Replaceable, Scheduled
from workbench.kv.stores.rows import Rows
from workbench_kernels import Scoring
from workbench_kernels.placing import Beside, place
from workbench_kernels.rows import Ragged
from workbench_kernels.shares import shares


class OverwritingLayer(Capturable, Protocol):
    """A layer that says itself which rows a new token comes to, and writes there what stands beside keys and values.

    replaces: it says how many rows there are, too.
    """

    replaces: bool

    @property
    def changed(self) -> list[Tensor]:
        """What a step writes over."""

    def take_in(self, position: Tensor, keys: Places, values: Places) -> None:
        """Know of the token at `position` int64 [1], and say where its key and value come to."""


class Places(NamedTuple):
    """Where the next row of each head comes to, int64 [k], and how many rows there are then, int32 [k]: for a layer to
    write into.
    """

    ends: Tensor
    lengths: Tensor


Foretold = dict[tuple[str, bytes], Tensor]
"""Slots by what they follow from, for layers alike."""


class EvictingLayer:
    """A store as `Capturable`, with the method that evicts, and the entries of a head that it holds at most."""

    def __init__(
        self, store: Replaceable, evicting: KVMethod, capacity: int, position: int, steps: int, foretold: Foretold
    ) -> None:
        """position: of the next token. foretold: what is known of other layers, and may be of this one.

        Raises NotApplicable where entries cannot be told apart on the device alone.
        """
        if store.longest != store.shortest:
            raise NotApplicable(f"{evicting.key} evicts from heads of unequal length")
        self.store, self.evicting, self.capacity, self.position = store, evicting, capacity, position
        self.replaces = self._leaving().shape[1] == 1
        if self.replaces and store.longest < capacity:
            raise NotApplicable("the cache is not full yet")
        self._watches = type(evicting).update_state is not KVMethod.update_state
        self._slots: Tensor | None = None  # those that leave, step by step, int64 [steps, k], where that is known
        self._gone: Tensor | None = None  # and their positions, in host memory
        if self.replaces and evicting.evicts_by_position and not self._watches:
            where = store.slots()[0].cpu().contiguous()
            key = evicting.key, where.numpy().tobytes()
            if key not in foretold:
                foretold[key] = self._foretell(where, steps)
            both = foretold[key].expand(2, -1, where.shape[0])
            self._slots, self._gone = both[0].to(store.beside[1].data.device), both[1]

    def _foretell(self, where: Tensor, steps: int) -> Tensor:
        """The slots that leave while so many tokens come, and the positions there, [2, steps, k], of positions [k, m];
        k is 1 where heads are alike.
        """
        where = where[:1].clone() if bool((where == where[:1]).all()) else where.clone()
        state, found = torch.zeros(where.shape), []
        for step in range(steps):
            slots = self.evicting.evict(state, where, 1)
            found.append(torch.stack([slots[:, 0], where.gather(1, slots)[:, 0].long()]))
            where.scatter_(1, slots, self.position + step)
        return torch.stack(found, dim=1)

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

    def take_in(self, position: Tensor, keys: Places, values: Places) -> None:
        key_rows, value_rows = self.store.growing
        where, state = self.store.beside
        states = state.data if self._watches else None
        if not self.replaces:
            if states is not None:
                states.index_fill_(0, keys.ends - key_rows.begins + state.begins, 0.0)
            return
        slots, first = self._slots, self.position
        if slots is None:
            slots = self.evicting.evict(self._state(), self._seen(where)[..., 0], 1).mT
        ends, rooms = (keys.ends, values.ends), (_room(key_rows), _room(value_rows))
        beside = Beside(where.data, states)
        place(slots, position, None if self._slots is None else first, ends, rooms, beside)

    def _seen(self, rows: Rows) -> Tensor:
        """Rows [k, capacity, w] of every head, as far as there will be any."""
        return rows.data.view(rows.heads, -1, rows.data.shape[1])[:, : self.capacity]

    def _state(self) -> Tensor:
        state = self._seen(self.store.beside[1])
        return state[..., 0] if state.shape[2] == 1 else state

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        attention = self.store.captured_state(keys, values, pin, self._gone)

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


class ScheduledLayer:
    """A store that scores what it holds anew, as `Capturable`, where that tells beforehand who leaves."""

    replaces = True

    def __init__(self, store: Scheduled, schedule: Iterable[tuple[int, int]], position: int) -> None:
        """schedule: for each token from `position` on the row it comes to and how many there are then."""
        self.store, self.position = store, position
        plan = torch.tensor(list(schedule), dtype=torch.int64)
        self._lengths = plan[:, 1].tolist()
        there = plan.to(store.growing[0].data.device)
        self._rows, self._longest = there[:, :1].contiguous(), there[:, 1].to(torch.int32)

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.store.growing

    @property
    def changed(self) -> list[Tensor]:
        return [rows.data for rows, _ in self.store.room_for(0)]

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        return self.store.room_for(steps)

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self.store.most_rows(steps)

    @property
    def fixed_nbytes(self) -> int:
        return self.store.fixed_nbytes

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return None

    def settle(self) -> None:
        """Nothing waits."""

    def take_in(self, position: Tensor, keys: Places, values: Places) -> None:
        key_rows, value_rows = self.store.growing
        rooms, (where,) = (_room(key_rows), _room(value_rows)), self.store.placed
        place(self._rows, position, self.position, (keys.ends, values.ends), rooms, Beside(where.data, None))
        now = self._longest.index_select(0, position - self.position)
        for places in (keys, values):
            places.lengths.copy_(now.expand_as(places.lengths))

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        return self.store.captured_attention(keys, values, steps, pin)

    def advance(self, positions: Tensor) -> None:
        last = int(positions[-1])
        self.store.follow(last, self._lengths[last - self.position] - self.store.longest)


def _room(rows: Rows) -> int:
    """From where one head's rows begin to the next, of heads equally long."""
    return rows.data.shape[0] // rows.heads
