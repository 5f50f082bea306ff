"""Sparse rows: the largest numbers of each, packed, with a bitmap of where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Pin
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape, index_nbytes
from workbench.kv.stores.positioned import PositionedStore
from workbench.kv.stores.pruned import kept_of
from workbench.kv.stores.rows import Rows, joined
from workbench.kv.stores.store import Store, for_kernel
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.building import expand_rows, kept, sparse_rows
from workbench_kernels.decode_bitmap import decode_bitmap
from workbench_kernels.kept import Kept
from workbench_kernels.rows import Ragged
from workbench_kernels.rows import SparseRows as KernelRows

_BLOCK = 32  # tokens that are pruned together between captured steps


class SparseRows:
    """Rows of d numbers of which each keeps its c largest magnitudes, in order, and d bits that say which they are."""

    def __init__(self, numbers: Rows, bitmap: Rows, width: int) -> None:
        """numbers [t, c]; bitmap uint8 [t, ceil(d / 8)] as `pack` lays bits out; width: d."""
        self.numbers, self.bitmap, self.width = numbers, bitmap, width

    @classmethod
    def of(cls, x: Tensor, lengths: Tensor, count: int, dtype: torch.dtype) -> SparseRows:
        """The `count` largest of each row of x [t, d], head after head with `lengths` [k] rows each."""
        numbers, bitmap = sparse_rows(x[None], count, dtype)
        heads = lengths.numel()
        return cls(Rows(numbers, heads, lengths), Rows(bitmap, heads, lengths), x.shape[1])

    @classmethod
    def where(cls, x: Tensor, chosen: Kept, count: int, dtype: torch.dtype) -> SparseRows:
        """The `count` largest of each chosen row of x [k, n, d]."""
        every = x.shape[1] and chosen.complete
        numbers, bitmap = sparse_rows(x, count, dtype, chosen=None if every else chosen)
        heads = len(x)
        return cls(Rows(numbers, heads, chosen.counts), Rows(bitmap, heads, chosen.counts), x.shape[2])

    def append(self, x: Tensor) -> None:
        """Prune and add x [k, q, d]."""
        stored = self.numbers.data
        numbers, bitmap = sparse_rows(x, stored.shape[1], stored.dtype)
        self.numbers.append(numbers.view(*x.shape[:2], -1))
        self.bitmap.append(bitmap.view(*x.shape[:2], -1))

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """What the whole buffer stands for, [t, d], zeros where nothing is held."""
        return expand_rows(self.numbers.data, self.bitmap.data, self.width, dtype)

    def ragged(self, tail: Rows) -> KernelRows:
        """The rows, followed by those of `tail`, as kernels take them."""
        return KernelRows(self.numbers.ragged(), self.bitmap.ragged(), tail.ragged())

    def tensors(self) -> list[Tensor]:
        return [*self.numbers.tensors(), *self.bitmap.tensors()]

    def clone(self) -> SparseRows:
        return SparseRows(self.numbers.clone(), self.bitmap.clone(), self.width)


class BitmapStore(PositionedStore):
    """Keys and values as sparse rows, followed by the newest `recent` whole; new tokens enter there and are pruned as
    they leave. A kernel reads the rows in place; where there is none, they are expanded into scratch memory.
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
        super().__init__(positions)
        self.keys, self.key_tail = keys, key_tail
        self.values, self.value_tail = values, value_tail
        self.recent = recent

    @classmethod
    def where(
        cls, keys: Tensor, values: Tensor, keep: Tensor, dtype: torch.dtype, *, pruned: float, recent: int
    ) -> BitmapStore:
        """The entries of keys [k, n, d], values [k, n, dv] at which keep [k, n] is True, a share `pruned` of the
        numbers of all but the last `recent` dropped.
        """
        chosen = kept(keep)
        older = (chosen.counts - recent).clamp_min(0)
        old, new = chosen.first(older), chosen.after(older)

        key_tail, value_tail = Rows.both(keys, values, new, dtype)
        return cls(
            SparseRows.where(keys, old, kept_of(keys.shape[-1], pruned), dtype),
            key_tail,
            SparseRows.where(values, old, kept_of(values.shape[-1], pruned), dtype),
            value_tail,
            None if chosen.complete else Rows.positions(chosen),
            recent,
        )

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.key_tail.append(keys)
        self.value_tail.append(values)
        self._append_positions(positions)
        self.settle()

    def settle(self) -> None:
        """Prune what has been in the tail for long enough."""
        ready = self.key_tail.shortest - self.recent
        if ready > 0:
            self.keys.append(self.key_tail.cut_front(ready))
            self.values.append(self.value_tail.cut_front(ready))

    def reserve(self, tokens: int) -> None:
        sparse_rows = (self.keys.numbers, self.keys.bitmap, self.values.numbers, self.values.bitmap)
        for rows in (*sparse_rows, *self._positions):
            rows.reserve(tokens)

    # -- captured decode steps: what leaves the tail one at a time otherwise leaves it in blocks

    @property
    def capturable(self) -> Capturable | None:
        return self

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.key_tail, self.value_tail

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        pruned = max(self.key_tail.shortest + steps - self.recent, 0)
        room = [(rows, steps) for rows in (self.key_tail, self.value_tail, *self._positions)]
        return room + [(rows, pruned) for side in (self.keys, self.values) for rows in (side.numbers, side.bitmap)]

    def most_rows(self, steps: int) -> tuple[int, int]:
        more = min(steps, self.steps_until_settled)
        return self.key_tail.longest + more, self.value_tail.longest + more

    @property
    def fixed_nbytes(self) -> int:
        return 0

    @property
    def period(self) -> int:
        return max(self.recent, _BLOCK)

    @property
    def steps_until_settled(self) -> int:
        return max(self.recent + self.period - self.key_tail.shortest, 1)

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        more = self.key_tail.longest + steps  # all that is pruned has been in the tail

        def pinned(side: SparseRows, tail: Ragged) -> KernelRows:
            numbers, bitmap = (pin(rows, rows.longest + more) for rows in (side.numbers, side.bitmap))
            return KernelRows(numbers, bitmap, tail)

        sides = pinned(self.keys, keys), pinned(self.values, values)
        return lambda query, scoring: decode_bitmap(query, *sides, scoring)[0]

    def advance(self, positions: Tensor) -> None:
        self._grown(self.growing, positions)

    @property
    def kv_heads(self) -> int:
        return self.key_tail.heads

    @property
    def device(self) -> torch.device:
        return self.key_tail.data.device

    @property
    def _complete_length(self) -> int:
        return self.keys.bitmap.longest + self.key_tail.longest

    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            joined(self.keys.bitmap, self.key_tail, self.keys.expanded(dtype)),
            joined(self.values.bitmap, self.value_tail, self.values.expanded(dtype)),
        )

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        fits, asked = for_kernel(query, self.key_tail.data, query_positions, scoring)
        if not fits or scoring.window is not None:
            return None
        return decode_bitmap(
            query,
            self.keys.ragged(self.key_tail),
            self.values.ragged(self.value_tail),
            scoring,
            query_positions=asked,
            positions=self._ragged_positions,
        )[0]

    def tensors(self) -> dict[str, list[Tensor]]:
        dtype = str(self.key_tail.data.dtype).removeprefix("torch.")
        sparse = [*self.keys.tensors(), *self.values.tensors(), *self._position_tensors()]
        return {f"{dtype} with bitmap": sparse, dtype: [*self.key_tail.tensors(), *self.value_tail.tensors()]}

    def clone(self) -> Self:
        twin = super().clone()
        twin.keys, twin.key_tail = self.keys.clone(), self.key_tail.clone()
        twin.values, twin.value_tail = self.values.clone(), self.value_tail.clone()
        return twin


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

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        return BitmapStore.where(
            layer.keys, layer.values, tiers > 0, self.dtype, pruned=self.pruned, recent=self.recent
        )
