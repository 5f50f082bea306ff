"""One stretch of tokens at 1 bit, all others whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kv.stores.format import DenseFormat, Format, Shape, index_nbytes
from workbench.kv.stores.frozen import FrozenStore, bitmap_nbytes
from workbench.kv.stores.packed import PackedRows, first_of
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace

_HALF = 2  # scales and zeros are float16


@dataclass(frozen=True)
class OneBitFormat(Format):
    """Of each head's kept entries, `length` from number `start` on at 1 bit, the others at `dtype`.

    A channel's numbers share two values over `group` consecutive entries: its quantiles `quantile` and 1 - quantile.
    The last `recent` entries are never part of the stretch, which ends at a whole group; length None reaches as far as
    that allows.
    """

    dtype: torch.dtype
    group: int
    quantile: float
    start: int
    length: int | None
    recent: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"1-bit and {str(self.dtype).removeprefix('torch.')}",)

    def quantised(self, kept: Tensor) -> Tensor:
        """How many entries are stored at 1 bit where this many are kept, int64 as `kept`."""
        room = (kept - self.start - self.recent).clamp_min(0)
        if self.length is not None:
            room = room.clamp_max(self.length)
        return room // self.group * self.group

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        low = self.quantised(selected)
        whole = DenseFormat(self.dtype).nbytes(shape, selected - low)
        low = low[(low > 0).any(dim=1)]  # where no group is full nothing is quantised
        entries, groups = int(low.sum()), int(low.sum()) // self.group
        codes = sum(
            entries * -(-width // 8) + groups * 2 * _HALF * width for width in (shape.key_width, shape.value_width)
        )
        return whole + codes + 6 * index_nbytes(low) + bitmap_nbytes(low, shape.tokens)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        keep = tiers > 0
        count = self.quantised(keep.sum(dim=1))
        low = first_of(keep, self.start + count) & ~first_of(keep, torch.full_like(count, self.start))
        low = low & (count > 0)[:, None]
        whole = DenseFormat(self.dtype).build(layer, (keep & ~low).to(tiers.dtype), None)
        if not bool(low.any()):
            return whole
        keys, values = (
            PackedRows.of(x[low].float(), count, 1, self.group, "channel", clip=self.quantile)
            for x in (layer.keys, layer.values)
        )
        return SplitStore((whole, FrozenStore.where(keys, values, low)))
