"""Host memory as a tier of its own: rows that lie there and are fetched when a query needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.kv.stores.rows import Rows

_BLOCK = 64  # entries for which room is made at least


class HostRows:
    """For each KV head some entries in host memory: keys and values, and the positions they have.

    Where a GPU works on them they are pinned, and fetching copies on a stream of its own. On a CPU-only machine they
    are ordinary memory, counted apart.
    """

    def __init__(self, keys: Rows, values: Rows, positions: Rows, device: torch.device) -> None:
        self.keys, self.values, self.positions, self.device = keys, values, positions, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pin()

    @classmethod
    def where(cls, keys: Tensor, values: Tensor, keep: Tensor, dtype: torch.dtype) -> HostRows:
        """The entries of keys [k, n, d] and values [k, n, dv] at which keep [k, n] is True."""
        where = torch.arange(keys.shape[1]).expand(keys.shape[0], -1)[..., None]
        chosen = keep.cpu()
        return cls(
            Rows.where(keys.to(dtype).cpu(), chosen, dtype),
            Rows.where(values.to(dtype).cpu(), chosen, dtype),
            Rows.where(where, chosen, torch.int32),
            keys.device,
        )

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self.positions.longest

    def slots(self) -> tuple[Tensor, Tensor | None]:
        """The position in each slot, int [k, m] in host memory, and which slots are real, bool [k, m]; None: all."""
        return self.positions.view()[..., 0], self.positions.valid()

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add keys [k, e, d] and values [k, e, dv] at positions [k, e]; keys are left out where none are held here."""
        keys = keys[..., : self.keys.data.shape[1]]
        for rows, new in ((self.keys, keys), (self.values, values), (self.positions, positions[..., None])):
            # Pinning copies everything, so room is made for many at once.
            rows.append(new.to("cpu", rows.data.dtype), block=max(_BLOCK, rows.longest // 4))
        self._pin()

    def fetch(self, slots: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to copy the entries in slots [k, u] of each head to the device.

        Returns what waits for keys [k, u, d], values [k, u, dv] and positions int64 [k, u] there. Slots beyond a
        head's length give entries that mean nothing.
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
        return HostRows(self.keys.clone(), self.values.clone(), self.positions.clone(), self.device)

    def _copied(self, slots: Tensor, of: tuple[Rows, ...]) -> Callable[[], tuple[Tensor, ...]]:
        slots = slots.to("cpu")
        parts = []
        for rows in of:
            at = (rows.begins[:, None] + slots).clamp_max_(max(rows.data.shape[0] - 1, 0))
            part = rows.data.new_empty(*slots.shape, rows.data.shape[1], pin_memory=self._stream is not None)
            torch.index_select(rows.data, 0, at.flatten(), out=part.view(-1, rows.data.shape[1]))
            parts.append(part)
        if self._stream is None:
            return lambda: tuple(_finished(part.to(self.device)) for part in parts)
        stream = self._stream
        with torch.cuda.stream(stream):
            there = [part.to(self.device, non_blocking=True) for part in parts]

        def wait() -> tuple[Tensor, ...]:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for copy in there:  # made on the other stream: not to be given to anyone else before this one is done
                copy.record_stream(current)
            return tuple(_finished(copy) for copy in there)

        return wait

    def _pin(self) -> None:
        if self._stream is None:
            return
        for rows in (self.keys, self.values, self.positions):
            if rows.data.numel() and not rows.data.is_pinned():
                rows.data = rows.data.pin_memory()


def _finished(part: Tensor) -> Tensor:
    """Positions as [k, u] and int64; keys and values as they are."""
    return part[..., 0].long() if part.dtype == torch.int32 else part
