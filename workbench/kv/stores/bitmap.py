"""Sparse rows: the largest numbers of each, packed, with a bitmap of where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.packed import first_of
from workbench.kv.stores.pruned import kept_of
from workbench.kv.stores.rows import Rows, joined
from workbench.kv.stores.store import Contents, Store
from workbench.trace import LayerTrace
from workbench_kernels import pack, unpack


class SparseRows:
    """Rows of d numbers of which each keeps its c largest magnitudes, in order, and d bits that say which they are."""

    def __init__(self, numbers: Rows, bitmap: Rows, width: int) -> None:
        """numbers [t, c]; bitmap uint8 [t, ceil(d / 8)] as `pack` lays bits out; width: d."""
        self.numbers, self.bitmap, self.width = numbers, bitmap, width

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor, count: int, dtype: torch.dtype) -> SparseRows:
        """The `count` largest of each row of x [t, d], head after head with `lengths` [k] rows each."""
        numbers, bitmap = sparse(x, count)
        heads = lengths.numel()
        return cls(Rows(numbers.to(dtype), heads, lengths), Rows(bitmap, heads, lengths), x.shape[1])

    def append(self, x: Tensor) -> None:
        """Prune and add x [k, q, d]."""
        numbers, bitmap = sparse(x, self.numbers.data.shape[1])
        self.numbers.append(numbers)
        self.bitmap.append(bitmap)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """What the whole buffer stands for, [t, d], zeros where nothing is held."""
        bits = unpack(self.bitmap.data, 1, self.width).bool()
        # A number's place in its row is how many bits are set before its own.
        place = (bits.cumsum(dim=1) - 1).clamp_(0, self.numbers.data.shape[1] - 1)
        return self.numbers.data.to(dtype).gather(1, place).masked_fill_(~bits, 0)

    def tensors(self) -> list[Tensor]:
        return [*self.numbers.tensors(), *self.bitmap.tensors()]

    def clone(self) -> SparseRows:
        return SparseRows(self.numbers.clone(), self.bitmap.clone(), self.width)


def sparse(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest magnitudes of each last dimension of x [..., d], in order [..., count], and the packed bitmap
    uint8 [..., ceil(d / 8)]. Exactly `count` bits are set, zeros included.
    """
    largest = x.abs().topk(count, dim=-1, sorted=False).indices
    bits = torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, largest, True)
    return x[bits].view(*x.shape[:-1], count), pack(bits.to(torch.uint8), 1)


class BitmapStore(Store):
    """Keys and values as sparse rows, followed by the newest `recent` whole; new tokens enter there and are pruned as
    they leave. Attention expands the rows into scratch memory, the reference for a kernel that reads them in place.
    """

    def __init__(
        self,
        keys: SparseRows,
        key_tail: Rows,
        values: SparseRows,
        value_tail: Rows,
        positions: Rows | None,
        recent: int,
    ) -> None:
        self.keys, self.key_tail = keys, key_tail
        self.values, self.value_tail = values, value_tail
        self._positions = positions
        self.recent = recent

    @classmethod
    def where(
        cls, keys: Tensor, values: Tensor, keep: Tensor, dtype: torch.dtype, *, pruned: float, recent: int
    ) -> BitmapStore:
        """The entries of keys [k, n, d], values [k, n, dv] at which keep [k, n] is True, a share `pruned` of the
        numbers of all but the last `recent` dropped.
        """
        old = first_of(keep, (keep.sum(dim=1) - recent).clamp_min(0))
        where = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)[..., None]

        def side(x: Tensor) -> tuple[SparseRows, Rows]:
            older = SparseRows.of(x[old], old.sum(dim=1), kept_of(x.shape[-1], pruned), dtype)
            return older, Rows.where(x, keep & ~old, dtype)

        positions = None if bool(keep.all()) else Rows.where(where, keep, torch.int32)
        return cls(*side(keys), *side(values), positions, recent)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.key_tail.append(keys)
        self.value_tail.append(values)
        if self._positions is not None:
            self._positions.append(positions.to(torch.int32).expand(keys.shape[0], -1)[..., None])
        ready = int(self.key_tail.counts.min()) - self.recent
        if ready > 0:
            self.keys.append(self.key_tail.cut_front(ready))
            self.values.append(self.value_tail.cut_front(ready))

    def reserve(self, tokens: int) -> None:
        sparse_rows = (self.keys.numbers, self.keys.bitmap, self.values.numbers, self.values.bitmap)
        for rows in (*sparse_rows, *(() if self._positions is None else (self._positions,))):
            rows.reserve(tokens)

    def contents(self, dtype: torch.dtype) -> Contents:
        keys = joined(self.keys.bitmap, self.key_tail, self.keys.expanded(dtype))
        values = joined(self.values.bitmap, self.value_tail, self.values.expanded(dtype))
        if self._positions is None:
            return Contents(keys, values, torch.arange(keys.shape[1], device=keys.device)[None], None)
        return Contents(keys, values, self._positions.view()[..., 0], self._positions.valid())

    def tensors(self) -> dict[str, list[Tensor]]:
        dtype = str(self.key_tail.data.dtype).removeprefix("torch.")
        positions = [] if self._positions is None else self._positions.tensors()
        tail = [*self.key_tail.tensors(), *self.value_tail.tensors()]
        return {f"{dtype} with bitmap": [*self.keys.tensors(), *self.values.tensors(), *positions], dtype: tail}

    def clone(self) -> Self:
        positions = None if self._positions is None else self._positions.clone()
        key_tail, value_tail = self.key_tail.clone(), self.value_tail.clone()
        return type(self)(self.keys.clone(), key_tail, self.values.clone(), value_tail, positions, self.recent)


@dataclass(frozen=True)
class BitmapFormat(Format):
    """Kept entries at `dtype`, all but the last `recent` without a share `pruned` of their numbers."""

    dtype: torch.dtype
    pruned: float
    recent: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{str(self.dtype).removeprefix('torch.')}, {self.pruned:.0%} of numbers pruned",)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        older = (selected - self.recent).clamp_min(0)
        newer = selected - older
        partial = selected[(selected < shape.tokens).any(dim=1)]  # these need positions
        sides = sum(
            int(older.sum()) * (kept_of(width, self.pruned) * shape.itemsize + -(-width // 8))
            + int(newer.sum()) * width * shape.itemsize
            for width in (shape.key_width, shape.value_width)
        )
        indices = 2 * (2 * index_nbytes(older) + index_nbytes(newer)) + index_nbytes(partial)
        return sides + int(partial.sum()) * INDEX_BYTES + indices

    def build(self, layer: LayerTrace, tiers: Tensor, mass: Tensor | None) -> Store:
        return BitmapStore.where(
            layer.keys, layer.values, tiers > 0, self.dtype, pruned=self.pruned, recent=self.recent
        )
