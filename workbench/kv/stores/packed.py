"""Bit-packed stores: keys quantised per channel or per token, values per token, a full-precision tail."""

from __future__ import annotations

from ctypes import CDLL
from typing import Self

import torch
from torch import Tensor

from workbench.core.precision import check_finite
from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Droppable, Part, Pin, Place
from workbench.kv.stores.positioned import PositionedStore
from workbench.kv.stores.rows import Rows, joined
from workbench.kv.stores.store import for_kernel, state
from workbench_kernels import Scoring
from workbench_kernels.building import dequantise_rows, kept, quantise_rows
from workbench_kernels.cpu.token import leave
from workbench_kernels.decode import decode_packed
from workbench_kernels.kept import Kept
from workbench_kernels.rows import Axis, Ragged
from workbench_kernels.rows import PackedRows as KernelRows

WHOLE = 16  # bits of rows that are never quantised


class PackedRows:
    """Rows quantised to 1, 2, 4 or 8 bits in groups of `group`, packed along the channels; at `WHOLE` bits there are
    none, and whatever would be one stays in the tail behind them.

    axis "channel": every channel has a scale and zero per `group` consecutive rows of a head (row counts are
    multiples of `group`). axis "token": every row has a scale and zero per `group` consecutive channels (the last may
    be narrower). balance [k, d]: what each head's channels are multiplied with before they are quantised, undone when
    read.
    """

    def __init__(
        self,
        codes: Rows,
        scale: Rows,
        zero: Rows,
        bits: int,
        group: int,
        axis: Axis,
        channels: int,
        balance: Tensor | None = None,
    ) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.bits, self.group, self.axis, self.channels = bits, group, axis, channels
        self.balance = balance

    @property
    def code_bits(self) -> int:
        """The bits that codes are laid out in, also where there are none."""
        return min(self.bits, 8)

    @classmethod
    def of(
        cls,
        x: Tensor,
        lengths: Tensor,
        bits: int,
        group: int,
        axis: Axis,
        balance: Tensor | None = None,
    ) -> PackedRows:
        """Quantise x [t, d], head after head with `lengths` [k] rows each."""
        if balance is not None:
            x = x * torch.repeat_interleave(balance.float(), lengths, dim=0)
        quantised = quantise_rows(x[None], bits, group, axis)
        return cls(*_rows(quantised, lengths, group, axis), bits, group, axis, x.shape[1], balance)

    @classmethod
    def where(
        cls, x: Tensor, chosen: Kept, bits: int, group: int, axis: Axis, balance: Tensor | None = None
    ) -> PackedRows:
        """Quantise the chosen rows of x [k, n, d]."""
        every = x.shape[1] and chosen.complete
        quantised = quantise_rows(x, min(bits, 8), group, axis, chosen=None if every else chosen, balance=balance)
        return cls(*_rows(quantised, chosen.counts, group, axis), bits, group, axis, x.shape[2], balance)

    def append(self, x: Tensor, rows: int = 64) -> None:
        """Quantise and add x [k, q, d]; per channel, q must be a multiple of the group. Grows by `rows` at a time."""
        heads, count, _ = x.shape
        codes, scale, zero = quantise_rows(x, self.bits, self.group, self.axis, balance=self.balance)
        if not x.is_cuda:  # where it waits for nothing
            check_finite(scale, x, "keys or values, of which scales are held,")
            check_finite(zero, x, "keys or values, of which zeros are held,")
        per_scale = self.group if self.axis == "channel" else 1
        block = max(rows // per_scale, 1)
        self.codes.append(codes.view(heads, count, -1), block * per_scale)
        self.scale.append(scale.view(heads, count // per_scale, -1), block)
        self.zero.append(zero.view(heads, count // per_scale, -1), block)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` further rows a head."""
        self.codes.reserve(rows)
        per_scale = self.group if self.axis == "channel" else 1
        self.scale.reserve(-(-rows // per_scale))
        self.zero.reserve(-(-rows // per_scale))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """What the whole buffer stands for, [t, d]."""
        return dequantise_rows(
            self.codes.data,
            self.scale.data,
            self.zero.data,
            self.code_bits,
            self.group,
            self.axis,
            self.channels,
            dtype,
            balance=self.balance,
            owners=None if self.balance is None else self.codes.owners(),
        )

    def ragged(self, tail: Rows) -> KernelRows:
        """The rows, followed by those of `tail`, as kernels take them."""
        packed = self.codes.ragged(), self.scale.ragged(), self.zero.ragged()
        return KernelRows(*packed, tail.ragged(), self.code_bits, self.group, self.axis, self.balance)

    def pinned(self, tail: Ragged, steps: int, pin: Place) -> KernelRows:
        """The same for all of so many steps: everything that enters has been in the tail, so no head gets more than
        what is there and what comes.
        """
        return self.settled(tail, 0 if self.bits == WHOLE else tail.longest + steps, pin)

    def settled(self, tail: Ragged, more: int, pin: Place) -> KernelRows:
        """The same where no head gets more than so many rows."""
        codes, scale = (pin(rows, rows.longest + more) for rows in (self.codes, self.scale))
        zero = scale._replace(data=self.zero.data)
        return KernelRows(codes, scale, zero, tail, self.code_bits, self.group, self.axis, self.balance)

    def growing(self, rows: int) -> list[tuple[Rows, int]]:
        """What grows when so many rows join each head, and by how many."""
        per_scale = self.group if self.axis == "channel" else 1
        return [(self.codes, rows), (self.scale, rows // per_scale), (self.zero, rows // per_scale)]

    def refill(self, other: PackedRows) -> None:
        """Replace all by what `other` holds (see `Rows.refill`)."""
        for rows, fresh in ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero)):
            rows.refill(fresh)
        if self.balance is not None and other.balance is not None:
            self.balance.copy_(other.balance)

    def only(self, keep: Tensor) -> PackedRows:
        """The rows at which keep [k, longest] is True; only where each has a scale of its own (axis "token")."""
        parts = self.codes.only(keep), self.scale.only(keep), self.zero.only(keep)
        return PackedRows(*parts, self.bits, self.group, self.axis, self.channels, self.balance)

    def tensors(self) -> list[Tensor]:
        balance = [] if self.balance is None else [self.balance]
        return [*self.codes.tensors(), *self.scale.tensors(), *self.zero.tensors(), *balance]

    def clone(self) -> PackedRows:
        parts = self.codes.clone(), self.scale.clone(), self.zero.clone()
        balance = None if self.balance is None else self.balance.clone()
        return PackedRows(*parts, self.bits, self.group, self.axis, self.channels, balance)


def _rows(quantised: tuple[Tensor, Tensor, Tensor], lengths: Tensor, group: int, axis: Axis) -> tuple[Rows, Rows, Rows]:
    """Codes, scale and zero of heads with `lengths` [k] rows each."""
    scales = lengths // (group if axis == "channel" else 1)
    codes, scale, zero = quantised
    return Rows(codes, len(lengths), lengths), Rows(scale, len(lengths), scales), Rows(zero, len(lengths), scales)


class PackedStore(PositionedStore):
    """Keys and values quantised apart, each followed by a tail at full precision that new tokens enter.

    Keys grouped along the tokens leave their tail a block of `residual` rows at a time, as soon as it is full, so it
    holds fewer than `residual`; whatever is grouped along the channels leaves one token at a time and the last
    `residual` stay. Tokens leave once they have attended: each one's own pass still sees it exactly. A side at `WHOLE`
    bits has only its tail. drops: single entries can leave, for which all is grouped along the channels, `residual` is
    0, positions are held, and no buffer has room to spare.
    """

    def __init__(
        self,
        keys: PackedRows,
        key_tail: Rows,
        values: PackedRows,
        value_tail: Rows,
        positions: Rows | None,
        residual: int,
        *,
        drops: bool = False,
    ) -> None:
        super().__init__(positions)
        self.drops = drops
        self.keys, self.key_tail = keys, key_tail
        self.values, self.value_tail = values, value_tail
        self.residual = residual

    @classmethod
    def where(
        cls,
        keys: Tensor,
        values: Tensor,
        keep: Tensor,
        dtype: torch.dtype,
        *,
        bits: int,
        group: int,
        residual: int,
        key_axis: Axis = "channel",
        value_bits: int | None = None,
        balance: Tensor | None = None,
        positions: bool = False,
        drops: bool = False,
    ) -> PackedStore:
        """Quantise the entries of keys [k, n, d], values [k, n, dv] at which keep [k, n] is True.

        value_bits: if not those of the keys. balance [k, d]: factors of the keys' channels (see PackedRows).
        positions: hold them even where all are kept. drops: see the class.
        """
        chosen, value_bits = kept(keep), value_bits or bits
        front_keys = packed_length(chosen.counts, residual, group, key_axis, bits)
        front_values = packed_length(chosen.counts, residual, group, "token", value_bits)
        return cls(
            PackedRows.where(keys, chosen.first(front_keys), bits, group, key_axis, balance),
            Rows.where(keys, chosen.after(front_keys), dtype),
            PackedRows.where(values, chosen.first(front_values), value_bits, group, "token"),
            Rows.where(values, chosen.after(front_values), dtype),
            None if chosen.complete and not positions else Rows.positions(chosen),
            residual,
            drops=drops,
        )

    @property
    def _block(self) -> int:
        """How many rows buffers grow by."""
        return 1 if self.drops else 64

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.settle()  # where another store attended for this one
        self.key_tail.append(keys, self._block)
        self.value_tail.append(values, self._block)
        self._append_positions(positions, self._block)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        attended = super().attend(query, query_positions, scoring, weights=weights)
        self.attended()
        return attended

    def take(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Quantise and add keys [k, e, d], values [k, e, dv], each head's at positions [k, e] of its own.

        Only where everything is grouped along the channels, nothing stays exact and positions are held.
        """
        assert self.residual == 0
        assert self.keys.axis == "token"
        assert self._positions
        self.keys.append(keys.float())
        self.values.append(values.float())
        self._append_positions(positions)

    def settle(self) -> None:
        """Quantise what has been in the tail for long enough."""
        self._flush(self.key_tail, self.keys)
        self._flush(self.value_tail, self.values)
        if self.drops:
            self.key_tail, self.value_tail = self.key_tail.tight(), self.value_tail.tight()

    # -- single entries that leave

    @property
    def droppable(self) -> Droppable | None:
        return self if self.drops else None

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self.keys.codes.longest + self.key_tail.longest  # one of the two has all of them

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""
        return self.keys.codes.shortest + self.key_tail.shortest

    def evict(self, slots: Tensor) -> None:
        """Drop the entries in slots [k, e] of each head; the others keep their order."""
        self.settle()
        (where,) = self._positions
        keep = torch.ones(self.kv_heads, where.longest, dtype=torch.bool, device=self.device).scatter_(1, slots, False)
        keep &= torch.arange(where.longest, device=self.device) < where.counts[:, None]
        self._positions = (where.only(keep),)
        self.keys, self.key_tail = self._only(self.keys, self.key_tail, keep)
        self.values, self.value_tail = self._only(self.values, self.value_tail, keep)

    @staticmethod
    def _only(packed: PackedRows, tail: Rows, keep: Tensor) -> tuple[PackedRows, Rows]:
        """One side's entries at which keep [k, m] is True: all are packed, or all in the tail."""
        return (packed, tail.only(keep)) if packed.bits == WHOLE else (packed.only(keep), tail)

    def _flush(self, tail: Rows, packed: PackedRows) -> None:
        if packed.bits == WHOLE:
            return
        if tail.uniform and tail.longest <= self.residual and packed.axis == "token":
            return
        if tail.uniform and tail.longest < max(self.residual, packed.group) and packed.axis == "channel":
            return
        held = torch.tensor(tail.shortest)
        if ready := int(packed_length(held, self.residual, packed.group, packed.axis, packed.bits)):
            packed.append(tail.cut_front(ready).float(), self._block)

    def reserve(self, tokens: int) -> None:
        for rows in (self.key_tail, self.value_tail, *self._positions):
            rows.reserve(tokens)

    # -- captured decode steps: values, which leave their tail one at a time otherwise, leave it in blocks

    @property
    def capturable(self) -> Capturable | None:
        return self

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.key_tail, self.value_tail

    @property
    def _sides(self) -> tuple[tuple[PackedRows, Rows], tuple[PackedRows, Rows]]:
        return (self.keys, self.key_tail), (self.values, self.value_tail)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        room = [(rows, steps) for rows in (self.key_tail, self.value_tail, *self._positions)]
        for packed, tail in self._sides:
            most = 0 if packed.bits == WHOLE else tail.shortest + steps
            per_scale = packed.group if packed.axis == "channel" else 1
            room += packed.growing(most // per_scale * per_scale)
        return room

    def most_rows(self, steps: int) -> tuple[int, int]:
        keys, values = (
            tail.longest + (steps if limit is None else max(limit - tail.shortest, 1))
            for tail, limit in zip(self.growing, self._limits, strict=True)
        )
        return keys, values

    @property
    def fixed_nbytes(self) -> int:
        return sum(packed.balance.nbytes for packed, _ in self._sides if packed.balance is not None)

    @property
    def period(self) -> int:
        return max(self.residual, self.keys.group, self.values.group)

    @property
    def _limits(self) -> tuple[int | None, int | None]:
        """How long the tails of keys and values of the shortest head become before they are quantised; None: never."""
        later = self.residual + self.period
        block = max(self.residual, self.keys.group) if self.keys.axis == "channel" else later
        return None if self.keys.bits == WHOLE else block, None if self.values.bits == WHOLE else later

    @property
    def steps_until_settled(self) -> int | None:
        waits = [
            limit - tail.shortest for tail, limit in zip(self.growing, self._limits, strict=True) if limit is not None
        ]
        return max(min(waits), 1) if waits else None

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        packed_keys, packed_values = self._pinned(keys, values, steps, pin)
        return lambda query, scoring: decode_packed(query, packed_keys, packed_values, scoring)[0]

    def _pinned(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> tuple[KernelRows, KernelRows]:
        return self.keys.pinned(keys, steps, pin), self.values.pinned(values, steps, pin)

    parted = True

    def growing_part(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> Part:
        packed_keys, packed_values = self._pinned(keys, values, steps, pin)
        return lambda query, scoring: state(decode_packed(query, packed_keys, packed_values, scoring, lse=True))

    def part(self, dtype: torch.dtype, more: int, pin: Place) -> Part:
        tails = (pin(rows, rows.longest) for rows in self.growing)
        keys, values = (
            side.settled(tail, more, pin) for side, tail in zip((self.keys, self.values), tails, strict=True)
        )
        return lambda query, scoring: state(decode_packed(query, keys, values, scoring, lse=True))

    def advance(self, positions: Tensor) -> None:
        self._grown(self.growing, positions)

    def reserve_taken(self, tokens: int) -> None:
        """Make room for `tokens` more that `take` adds."""
        self.keys.reserve(tokens)
        self.values.reserve(tokens)
        for rows in self._positions:
            rows.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.key_tail.heads

    @property
    def device(self) -> torch.device:
        return self.key_tail.data.device

    @property
    def _complete_length(self) -> int:
        return self.keys.codes.longest + self.key_tail.longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            joined(self.keys.codes, self.key_tail, self.keys.dequantised(dtype)),
            joined(self.values.codes, self.value_tail, self.values.dequantised(dtype)),
        )

    @property
    def in_place(self) -> tuple[KernelRows, KernelRows]:
        return self.keys.ragged(self.key_tail), self.values.ragged(self.value_tail)

    def attended(self, library: CDLL | None = None) -> None:
        if library is not None:
            self._leave(library)
        self.settle()

    def _leave(self, library: CDLL) -> None:
        """Let a value leave the tail by compiled code, where one at a time does, and no more wait."""
        tail, packed = self.value_tail, self.values
        parts = packed.codes, packed.scale, packed.zero
        if packed.bits == WHOLE or packed.axis != "token" or packed.balance is not None or self.drops:
            return
        if tail.longest != self.residual + 1 or not all(rows.uniform for rows in (tail, *parts)):
            return
        for rows in parts:
            rows.reserve_block(self._block)
        codes, scale, zero = (rows.stretch for rows in parts)
        if leave(tail.stretch, codes, scale, zero, packed.bits, packed.group, library):
            for rows in parts:
                rows.grow(1)
            tail.cut(1)

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        fits, asked = for_kernel(query, self.key_tail.data, query_positions, scoring)
        if not fits:
            return None
        return decode_packed(
            query,
            self.keys.ragged(self.key_tail),
            self.values.ragged(self.value_tail),
            scoring,
            query_positions=asked,
            positions=self._ragged_positions,
        )[0]

    def tensors(self) -> dict[str, list[Tensor]]:
        exact = str(self.key_tail.data.dtype).removeprefix("torch.")
        by_precision: dict[str, list[Tensor]] = {}
        for rows in (self.keys, self.values):
            by_precision.setdefault(exact if rows.bits == WHOLE else f"{rows.bits}-bit", []).extend(rows.tensors())
        next(iter(by_precision.values())).extend(self._position_tensors())
        by_precision.setdefault(exact, []).extend([*self.key_tail.tensors(), *self.value_tail.tensors()])
        return by_precision

    def clone(self) -> Self:
        twin = super().clone()
        twin.keys, twin.key_tail = self.keys.clone(), self.key_tail.clone()
        twin.values, twin.value_tail = self.values.clone(), self.value_tail.clone()
        return twin


def packed_length(lengths: Tensor, residual: int, group: int, axis: Axis, bits: int) -> Tensor:
    """How many of each head's rows, int [k], are quantised when this many are held."""
    if bits == WHOLE:
        return torch.zeros_like(lengths)
    if axis == "channel":
        block = max(residual, group)
        return lengths // block * block
    return (lengths - residual).clamp_min(0)


def first_of(keep: Tensor, count: Tensor) -> Tensor:
    """The first count [k] True entries of keep [k, n]."""
    return keep & (keep.cumsum(dim=1) <= count[:, None])
