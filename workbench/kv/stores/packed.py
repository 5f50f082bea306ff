"""Bit-packed stores: keys quantised per channel or per token, values per token, a full-precision tail."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from workbench.core.precision import check_finite
from workbench.kv.stores.rows import Rows, joined
from workbench.kv.stores.store import Contents, Store, for_kernel
from workbench_kernels import Scoring
from workbench_kernels.building import Axis, Kept, dequantise_rows, kept, quantise_rows
from workbench_kernels.decode import decode_packed
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
        clip: float = 0.0,
    ) -> PackedRows:
        """Quantise x [t, d], head after head with `lengths` [k] rows each; for `clip` see `quantise`."""
        if balance is not None:
            x = x * torch.repeat_interleave(balance.float(), lengths, dim=0)
        found = quantise_rows(x[None], bits, group, axis, clip=clip)
        return cls(*_rows(found, lengths, group, axis), bits, group, axis, x.shape[1], balance)

    @classmethod
    def where(
        cls, x: Tensor, chosen: Kept, bits: int, group: int, axis: Axis, balance: Tensor | None = None
    ) -> PackedRows:
        """Quantise the chosen rows of x [k, n, d]."""
        every = x.shape[1] and chosen.complete
        found = quantise_rows(x, min(bits, 8), group, axis, chosen=None if every else chosen, balance=balance)
        return cls(*_rows(found, chosen.counts, group, axis), bits, group, axis, x.shape[2], balance)

    def append(self, x: Tensor) -> None:
        """Quantise and add x [k, q, d]; per channel, q must be a multiple of the group."""
        heads, count, _ = x.shape
        codes, scale, zero = quantise_rows(x, self.bits, self.group, self.axis, balance=self.balance)
        if not x.is_cuda:  # where it waits for nothing
            check_finite(scale, x, "keys or values, of which scales are held,")
            check_finite(zero, x, "keys or values, of which zeros are held,")
        per_scale = self.group if self.axis == "channel" else 1
        block = max(64 // per_scale, 1)
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

    def tensors(self) -> list[Tensor]:
        balance = [] if self.balance is None else [self.balance]
        return [*self.codes.tensors(), *self.scale.tensors(), *self.zero.tensors(), *balance]

    def clone(self) -> PackedRows:
        parts = self.codes.clone(), self.scale.clone(), self.zero.clone()
        balance = None if self.balance is None else self.balance.clone()
        return PackedRows(*parts, self.bits, self.group, self.axis, self.channels, balance)


def _rows(found: tuple[Tensor, Tensor, Tensor], lengths: Tensor, group: int, axis: Axis) -> tuple[Rows, Rows, Rows]:
    """Codes, scale and zero of heads with `lengths` [k] rows each."""
    scales = lengths // (group if axis == "channel" else 1)
    codes, scale, zero = found
    return Rows(codes, len(lengths), lengths), Rows(scale, len(lengths), scales), Rows(zero, len(lengths), scales)


class PackedStore(Store):
    """Keys and values quantised apart, each followed by a tail at full precision that new tokens enter.

    Keys grouped along the tokens leave their tail a block of `residual` rows at a time, as soon as it is full, so it
    holds fewer than `residual`; whatever is grouped along the channels leaves one token at a time and the last
    `residual` stay. Tokens leave once they have attended: each one's own pass still sees it exactly. A side at `WHOLE`
    bits has only its tail.
    """

    def __init__(
        self,
        keys: PackedRows,
        key_tail: Rows,
        values: PackedRows,
        value_tail: Rows,
        positions: Rows | None,
        residual: int,
    ) -> None:
        self.keys, self.key_tail = keys, key_tail
        self.values, self.value_tail = values, value_tail
        self._positions = positions
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
    ) -> PackedStore:
        """Quantise the entries of keys [k, n, d], values [k, n, dv] at which keep [k, n] is True.

        value_bits: if not those of the keys. balance [k, d]: factors of the keys' channels (see PackedRows).
        positions: hold them even where all are kept.
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
        )

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.settle()  # where another store attended for this one
        self.key_tail.append(keys)
        self.value_tail.append(values)
        if self._positions is not None:
            self._positions.append(positions.to(torch.int32).expand(keys.shape[0], -1)[..., None])

    def attend(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        found = super().attend(*args, **options)
        self.settle()
        return found

    def take(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Quantise and add keys [k, e, d], values [k, e, dv], each head's at positions [k, e] of its own.

        Only where everything is grouped along the channels, nothing stays exact and positions are held.
        """
        assert self.residual == 0 and self.keys.axis == "token" and self._positions is not None
        self.keys.append(keys.float())
        self.values.append(values.float())
        self._positions.append(positions.to(torch.int32)[..., None])

    def settle(self) -> None:
        """Quantise what has been in the tail for long enough."""
        self._flush(self.key_tail, self.keys)
        self._flush(self.value_tail, self.values)

    def _flush(self, tail: Rows, packed: PackedRows) -> None:
        if packed.bits == WHOLE:
            return
        ready = packed_length(tail.counts.min(), self.residual, packed.group, packed.axis, packed.bits)
        if int(ready):
            packed.append(tail.cut_front(int(ready)).float())

    def room(self, tokens: int) -> list[tuple[Rows, int]]:
        """The rows that grow with each token, and how many more each head needs for `tokens`."""
        return [(rows, tokens) for rows in (self.key_tail, self.value_tail, self._positions) if rows is not None]

    def reserve(self, tokens: int) -> None:
        for rows, more in self.room(tokens):
            rows.reserve(more)

    def take_up(self, positions: Tensor) -> None:
        """Count entries at positions int [q] whose keys and values others have written behind every head's tail."""
        self.key_tail.grow(positions.numel())
        self.value_tail.grow(positions.numel())
        if self._positions is not None:
            self._positions.append(positions.to(torch.int32).expand(self.key_tail.heads, -1)[..., None])

    def reserve_taken(self, tokens: int) -> None:
        """Make room for `tokens` more that `take` adds."""
        self.keys.reserve(tokens)
        self.values.reserve(tokens)
        if self._positions is not None:
            self._positions.reserve(tokens)

    def contents(self, dtype: torch.dtype) -> Contents:
        keys = joined(self.keys.codes, self.key_tail, self.keys.dequantised(dtype))
        values = joined(self.values.codes, self.value_tail, self.values.dequantised(dtype))
        if self._positions is None:
            return Contents(keys, values, torch.arange(keys.shape[1], device=keys.device)[None], None)
        return Contents(keys, values, self._positions.view()[..., 0], self._positions.valid())

    @property
    def positions(self) -> list[Tensor]:  # without `contents`, which dequantises everything
        if self._positions is None:
            count = self.keys.codes.longest + self.key_tail.longest
            return [torch.arange(count, device=self.key_tail.data.device)] * self.key_tail.heads
        rows, real = self._positions.view()[..., 0].long(), self._positions.valid()
        held = rows if real is None else rows.masked_fill(~real, torch.iinfo(torch.int64).max)
        counts = self._positions.counts.tolist()
        return [row[:count] for row, count in zip(held.sort(dim=-1).values, counts, strict=True)]

    def by_kernel(
        self, query: Tensor, query_positions: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor | None:
        fits, asked = for_kernel(query, self.key_tail.data, query_positions, window)
        if not fits:
            return None
        return decode_packed(
            query,
            self.keys.ragged(self.key_tail),
            self.values.ragged(self.value_tail),
            Scoring(scale, window, softcap),
            query_positions=asked,
            positions=None if self._positions is None else self._positions.ragged(),
        )[0]

    def tensors(self) -> dict[str, list[Tensor]]:
        exact = str(self.key_tail.data.dtype).removeprefix("torch.")
        found: dict[str, list[Tensor]] = {}
        for rows in (self.keys, self.values):
            found.setdefault(exact if rows.bits == WHOLE else f"{rows.bits}-bit", []).extend(rows.tensors())
        if self._positions is not None:
            next(iter(found.values())).extend(self._positions.tensors())
        found.setdefault(exact, []).extend([*self.key_tail.tensors(), *self.value_tail.tensors()])
        return found

    def clone(self) -> Self:
        positions = None if self._positions is None else self._positions.clone()
        key_tail, value_tail = self.key_tail.clone(), self.value_tail.clone()
        return type(self)(self.keys.clone(), key_tail, self.values.clone(), value_tail, positions, self.residual)


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
