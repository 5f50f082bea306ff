"""Host memory as a tier of its own: rows that lie there and are fetched when a query needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.kv.stores.rows import Rows
from workbench_kernels.fetching import fetch_rows

_HOST = torch.device("cpu")
_BLOCK = 64  # entries for which room is made at least


class HostRows:
    """For each KV head some entries in host memory: keys and values, and the positions they have.

    Where a GPU works on them they are pinned, and it reads from there what is fetched. On a CPU-only machine they are
    ordinary memory, counted apart.
    """

    def __init__(self, keys: Rows, values: Rows, positions: Rows, device: torch.device) -> None:
        self.keys, self.values, self.positions, self.device = keys, values, positions, device
        self._begins: dict[int, Tensor] = {}

    @classmethod
    def where(cls, keys: Tensor, values: Tensor, keep: Tensor, dtype: torch.dtype) -> HostRows:
        """The entries of keys [k, n, d] and values [k, n, dv] at which keep [k, n] is True."""
        device = keys.device
        where = torch.arange(keys.shape[1], device=device).expand(keys.shape[0], -1)[..., None]
        chosen = keep.to(device)
        parts = (
            Rows.where(keys, chosen, dtype),
            Rows.where(values, chosen, dtype),
            Rows.where(where, chosen, torch.int32),
        )
        there = [rows.to(_HOST) if rows.data.is_cuda else rows for rows in parts]
        return cls(there[0], there[1], there[2], device)

    @property
    def capturable(self) -> bool:
        """Whether a captured step may fetch from it: not on a GPU, where such steps failed their test for a reason that
        was not found.
        """
        return self.device.type != "cuda"

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self.positions.longest

    def slots(self) -> tuple[Tensor, Tensor | None]:
        """The position in each slot, int [k, m] in host memory, and which slots are real, bool [k, m]; None: all."""
        return self.positions.view()[..., 0], self.positions.valid()

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add keys [k, e, d] and values [k, e, dv] at positions [k, e]; keys are left out where none are held here."""
        keys, count = keys[..., : self.keys.data.shape[1]], positions.shape[1]
        if self.positions.spare < count:  # everything moves, so room is made for many at once
            self.reserve(max(count, _BLOCK, self.positions.longest // 4))
        for rows, new in ((self.keys, keys), (self.values, values), (self.positions, positions[..., None])):
            rows.append(new.to("cpu", rows.data.dtype))

    def reserve(self, entries: int) -> None:
        """Make room for so many more of each head, so that nothing moves when they come."""
        if self.positions.spare < entries:
            self._begins.clear()
            there = [rows.to(self.device) for rows in (self.keys, self.values, self.positions)]  # a GPU moves faster
            for rows in there:
                rows.reserve(entries)
            self.keys, self.values, self.positions = (rows.to(_HOST) for rows in there)
        for rows in (self.keys, self.values, self.positions):  # so that steps to come need not ask the host
            self._begin(rows)

    def fetch(self, slots: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to copy the entries in slots [k, u] of each head to the device; a negative one is not wanted.

        Returns what waits for keys [k, u, d], values [k, u, dv] and positions int64 [k, u] there. Slots that are not
        wanted, or beyond a head's length, give entries that mean nothing.
        """
        return self._copied(slots, (self.keys, self.values, self.positions))

    def fetch_values(self, slots: Tensor) -> Callable[[], Tensor]:
        """The same for values [k, u, dv] only."""
        wait = self._copied(slots, (self.values,))
        return lambda: wait()[0]

    def whole(self) -> tuple[Tensor, Tensor]:
        """The keys [k, m, d] and values [k, m, dv] in all slots."""
        return self.keys.view(), self.values.view()

    def release(self) -> None:
        """Let go of what was made for the pass that has attended."""

    def tensors(self) -> list[Tensor]:
        return [t for rows in (self.keys, self.values, self.positions) for t in rows.tensors()]

    def clone(self) -> HostRows:
        return HostRows(self.keys.to(_HOST), self.values.to(_HOST), self.positions.to(_HOST), self.device)

    def _copied(self, slots: Tensor, of: tuple[Rows, ...]) -> Callable[[], tuple[Tensor, ...]]:
        slots = slots.to(self.device)
        parts = []
        for rows in of:
            at = (self._begin(rows)[:, None] + slots).clamp_max_(max(rows.data.shape[0] - 1, 0))
            parts.append(_finished(fetch_rows(rows.data, at.masked_fill_(slots < 0, -1))))
        return lambda: tuple(parts)

    def _begin(self, rows: Rows) -> Tensor:
        """Where each head's rows begin, on the device, where it stays until they move."""
        if self.device.type != "cuda":
            return rows.begins.to(self.device)
        if id(rows) not in self._begins:
            self._begins[id(rows)] = rows.begins.to(self.device)
        return self._begins[id(rows)]


def _finished(part: Tensor) -> Tensor:
    """Positions as [k, u] and int64; keys and values as they are."""
    return part[..., 0].long() if part.dtype == torch.int32 else part
