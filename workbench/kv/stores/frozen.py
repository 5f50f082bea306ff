"""Quantised entries that no token joins: the settled part of a cache."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.packed import PackedRows
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, state
from workbench_kernels import dequantise, pack, unpack
from workbench_kernels.decode import decode_packed
from workbench_kernels.rows import PackedRows as KernelRows
from workbench_kernels.rows import Ragged

_ALL_ROWS = 1 << 20  # of a head share a channel's scale


class ChannelRows:
    """Rows quantised with one scale and zero for each channel of a head, over all its rows."""

    def __init__(self, codes: Rows, scale: Tensor, zero: Tensor, bits: int) -> None:
        """codes [t, bytes]; scale and zero float16 [k, d]."""
        self.codes, self.scale, self.zero, self.bits = codes, scale, zero, bits

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor, bits: int, share: float = 1.0) -> ChannelRows:
        """Quantise x [t, d], head after head with `lengths` [k] rows each.

        share: the levels of a channel reach from that much of its minimum to that much of its maximum; what lies beyond
        is rounded to the ends.
        """
        heads, channels = lengths.numel(), x.shape[1]
        codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
        scale = torch.zeros(heads, channels, dtype=torch.float16, device=x.device)
        zero = torch.zeros_like(scale)
        begin = 0
        if x.shape[0] and bool((lengths == lengths[0]).all()):  # all heads at once
            codes, scale, zero = _by_channel(x.unflatten(0, (heads, -1)), bits, share)
            return cls(Rows(pack(codes.flatten(0, 1), bits), heads), scale, zero, bits)
        for head, length in enumerate(lengths.tolist()):
            if length:
                rows = slice(begin, begin + length)
                codes[rows], scale[head], zero[head] = _by_channel(x[rows], bits, share)
            begin += length
        return cls(Rows(pack(codes, bits), heads, lengths), scale, zero, bits)

    def refill(self, other: ChannelRows) -> None:
        """Replace all by what `other` holds (see `Rows.refill`)."""
        self.codes.refill(other.codes)
        self.scale.copy_(other.scale)
        self.zero.copy_(other.zero)

    def growing(self, rows: int) -> list[tuple[Rows, int]]:
        """What grows when so many rows join each head, and by how many."""
        return [(self.codes, rows)]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """What the whole buffer stands for, [t, d]."""
        owners = self.codes.owners()
        codes = unpack(self.codes.data, self.bits, self.scale.shape[1])
        return dequantise(codes[..., None], self.scale[owners], self.zero[owners], dtype)[..., 0]

    @property
    def channels(self) -> int:
        return self.scale.shape[1]

    def settled(self, tail: Ragged, more: int, pin: Place) -> KernelRows:
        """The rows as kernels take them, wherever `pin` says; so many more of a head may join them."""
        each = torch.ones(len(self.scale), dtype=torch.int32, device=self.scale.device)
        scale = Ragged(self.scale, each.cumsum(0, dtype=torch.int32) - 1, each, 1)
        codes = pin(self.codes, self.codes.longest + more)
        assert codes.longest <= _ALL_ROWS
        return KernelRows(codes, scale, scale._replace(data=self.zero), tail, self.bits, _ALL_ROWS, "channel")

    def tensors(self) -> list[Tensor]:
        return [*self.codes.tensors(), self.scale, self.zero]

    def clone(self) -> ChannelRows:
        return ChannelRows(self.codes.clone(), self.scale.clone(), self.zero.clone(), self.bits)


def _by_channel(x: Tensor, bits: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [..., n, d] of x [..., n, d], scale and zero float16 [..., d], which are rounded first."""
    steps = 2**bits - 1
    zero = (x.amin(dim=-2) * share).to(torch.float16)
    scale = ((x.amax(dim=-2) * share - zero.float()) / steps).to(torch.float16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    codes = ((x - zero.float()[..., None, :]) / divisor[..., None, :]).round_().clamp_(0, steps)
    return codes.to(torch.uint8), scale, zero


class FrozenStore(Store):
    """Quantised keys and values at fixed positions; new tokens belong to another part of a SplitStore.

    Nothing moves here, so one bit for each position of the prompt says what is held, or nothing where it is a stretch.
    """

    def __init__(
        self,
        keys: PackedRows | ChannelRows,
        values: PackedRows | ChannelRows,
        bitmap: Tensor | None,
        tokens: int,
        first: int = 0,
    ) -> None:
        """bitmap: packed bits of the positions held, uint8 [k, ceil(tokens / 8)]; None if every one from `first` on is,
        up to the number of `tokens`.
        """
        self.keys, self.values, self.bitmap, self.tokens, self.first = keys, values, bitmap, tokens, first

    @classmethod
    def where(cls, keys: PackedRows | ChannelRows, values: PackedRows | ChannelRows, keep: Tensor) -> FrozenStore:
        """The entries at which keep [k, n] is True, already quantised in that order."""
        return cls(keys, values, None if bool(keep.all()) else pack(keep.to(torch.uint8), 1), keep.shape[1])

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        raise NotImplementedError("nothing joins a settled part: put it behind a growing one in a SplitStore")

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.heads

    @property
    def device(self) -> torch.device:
        return self.keys.codes.data.device

    @property
    def entries(self) -> int:
        return self.keys.codes.total

    def slots(self) -> tuple[Tensor, Tensor | None]:
        if self.bitmap is None:
            return torch.arange(self.first, self.tokens, device=self.device)[None], None
        # [t], head after head as the rows, but with no room between them
        positions, counts = unpack(self.bitmap, 1, self.tokens).nonzero()[:, 1], self.keys.codes.counts[:, None]
        steps = torch.arange(self.keys.codes.longest, device=self.device)
        places = counts.cumsum(dim=0) - counts + torch.where(steps < counts, steps, 0)
        return positions[places.clamp_max_(max(len(positions) - 1, 0))], self.keys.codes.valid()

    def contents(self, dtype: torch.dtype) -> Dequantised:
        places = self.keys.codes.slots()  # [k, m]
        keys, values = self.keys.dequantised(dtype)[places], self.values.dequantised(dtype)[places]
        return Dequantised(keys, values, *self.slots())

    def sides(self, dtype: torch.dtype, more: int, pin: Place) -> tuple[KernelRows, KernelRows]:
        """Keys and values as kernels take them, beside queries of this type; so many more of a head may join them."""
        none = torch.zeros(self.kv_heads, dtype=torch.int32, device=self.device)
        widths = self.keys.channels, self.values.channels
        empty = (Ragged(torch.empty(0, width, dtype=dtype, device=self.device), none, none, 0) for width in widths)
        keys, values = (
            side.settled(tail, more, pin) for side, tail in zip((self.keys, self.values), empty, strict=True)
        )
        return keys, values

    parted = True

    def part(self, dtype: torch.dtype, more: int, pin: Place) -> Part:
        keys, values = self.sides(dtype, more, pin)
        return lambda query, scoring: state(decode_packed(query, keys, values, scoring, lse=True))

    def refill(self, other: Self) -> None:
        """Hold what `other` does, where room was reserved for it and each head has equally many more entries."""
        for side, fresh in ((self.keys, other.keys), (self.values, other.values)):
            side.refill(fresh)  # type: ignore[arg-type]  # sides are of the same kind
        self.bitmap, self.tokens, self.first = other.bitmap, other.tokens, other.first

    def room_for(self, more: int) -> list[tuple[Rows, int]]:
        """What grows when so many entries of each head join, and by how many."""
        return [*self.keys.growing(more), *self.values.growing(more)]

    def tensors(self) -> dict[str, list[Tensor]]:
        bitmap = [] if self.bitmap is None else [self.bitmap]
        return {f"{self.keys.bits}-bit": [*self.keys.tensors(), *self.values.tensors(), *bitmap]}

    def clone(self) -> Self:
        bitmap = None if self.bitmap is None else self.bitmap.clone()
        return type(self)(self.keys.clone(), self.values.clone(), bitmap, self.tokens, self.first)


def bitmap_nbytes(counts: Tensor, tokens: int) -> int:
    """Bytes of the bitmaps of layers that hold counts [l, k] of `tokens` positions."""
    partial = (counts < tokens).any(dim=1)
    return int(partial.sum()) * counts.shape[1] * -(-tokens // 8)
