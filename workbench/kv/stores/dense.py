"""Plain stores: every head equally long (dense), each with a length of its own (ragged), or a sliding window."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Contents, Store


class DenseStore(Store):
    """Keys and values at one precision, with a number of positions per KV head that is data.

    A store that holds everything from position 0 needs no positions; any other keeps them as int32 per entry. `mass`,
    one float32 per entry or a few, is what methods that evict while decoding remember about each entry.
    """

    def __init__(self, keys: Rows, values: Rows, positions: Rows | None, mass: Rows | None = None) -> None:
        self.keys, self.values, self.mass = keys, values, mass
        self._positions = positions

    @classmethod
    def where(
        cls, keys: Tensor, values: Tensor, keep: Tensor, dtype: torch.dtype, mass: Tensor | None = None
    ) -> DenseStore:
        """The entries of keys [k, n, d], values [k, n, dv], mass [k, n] or [k, n, w] at which keep [k, n] is True."""
        complete = bool(keep.all()) and mass is None
        where = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)[..., None]
        return cls(
            Rows.where(keys, keep, dtype),
            Rows.where(values, keep, dtype),
            None if complete else Rows.where(where, keep, torch.int32),
            None if mass is None else Rows.where(mass.view(*mass.shape[:2], -1), keep, torch.float32),
        )

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, keep: Tensor, dtype: torch.dtype) -> DenseStore:
        """The same, of entries that stand at positions [k or 1, n]."""
        where = positions.expand(keys.shape[0], -1)[..., None]
        return cls(Rows.where(keys, keep, dtype), Rows.where(values, keep, dtype), Rows.where(where, keep, torch.int32))

    @property
    def longest(self) -> int:
        return self.keys.longest

    @property
    def slot_positions(self) -> Tensor:
        """The position in each slot, int [k or 1, m]."""
        if self._positions is None:
            return torch.arange(self.keys.longest, device=self.keys.data.device)[None]
        return self._positions.view()[..., 0]

    @property
    def remembered(self) -> Tensor | None:
        """What is remembered of the entry in each slot, float32 [k, m], or [k, m, w] where it is w > 1 numbers."""
        if self.mass is None:
            return None
        rows = self.mass.view()
        return rows[..., 0] if rows.shape[-1] == 1 else rows

    def remember(self, evidence: Tensor) -> None:
        """Replace what is remembered, laid out as `remembered` shows it."""
        assert self.mass is not None
        self.mass.write(evidence.view(*evidence.shape[:2], -1))

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)
        if self._positions is not None:
            self._positions.append(positions.to(torch.int32).expand(keys.shape[0], -1)[..., None])
        if self.mass is not None:
            self.mass.append(torch.zeros(*keys.shape[:2], self.mass.data.shape[1], device=keys.device))

    def evict(self, slots: Tensor) -> None:
        """Drop the entries in slots [k, e] of each head; the last entries move into the freed slots."""
        count = slots.shape[1]
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
        for rows in (self.keys, self.values, self._positions, self.mass):
            if rows is not None:
                rows.move(source, target, count)

    def reserve(self, tokens: int) -> None:
        for rows in (self.keys, self.values, self._positions, self.mass):
            if rows is not None:
                rows.reserve(tokens)

    def contents(self, dtype: torch.dtype) -> Contents:
        return Contents(
            self.keys.view().to(dtype), self.values.view().to(dtype), self.slot_positions, self.keys.valid()
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        held = [rows for rows in (self.keys, self.values, self._positions, self.mass) if rows is not None]
        return {_name(self.keys.data.dtype): [t for rows in held for t in rows.tensors()]}

    def clone(self) -> Self:
        copies = [None if r is None else r.clone() for r in (self.keys, self.values, self._positions, self.mass)]
        keys, values, positions, mass = copies
        assert keys is not None and values is not None
        return type(self)(keys, values, positions, mass)


class SlidingStore(Store):
    """The last `window` positions of a sliding-window layer, exact."""

    def __init__(self, keys: Tensor, values: Tensor, end: int, window: int) -> None:
        """keys [k, m, d], values [k, m, dv] of the positions before `end`."""
        self.keys, self.values, self.end, self.window = keys, values, end, window

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, window: int, dtype: torch.dtype) -> SlidingStore:
        """The window's part of keys [k, n, d] and values [k, n, dv]."""
        kept = [x[:, -window:].to(dtype, copy=True).contiguous() for x in (keys, values)]
        return cls(kept[0], kept[1], keys.shape[1], window)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        # Tokens read together still need the window of the first of them: the rest is cut once they have attended.
        first = max(self.keys.shape[1] - (self.window - 1), 0)
        self.keys = torch.cat([self.keys[:, first:], keys.to(self.keys.dtype)], dim=1)
        self.values = torch.cat([self.values[:, first:], values.to(self.values.dtype)], dim=1)
        self.end = int(positions[-1]) + 1

    def attend(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        found = super().attend(*args, **options)
        if self.keys.shape[1] > self.window:
            self.keys, self.values = self.keys[:, -self.window :].clone(), self.values[:, -self.window :].clone()
        return found

    def contents(self, dtype: torch.dtype) -> Contents:
        positions = torch.arange(self.end - self.keys.shape[1], self.end, device=self.keys.device)[None]
        return Contents(self.keys.to(dtype), self.values.to(dtype), positions, None)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {_name(self.keys.dtype): [self.keys, self.values]}

    def clone(self) -> Self:
        return type(self)(self.keys.clone(), self.values.clone(), self.end, self.window)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
