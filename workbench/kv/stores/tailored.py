"""Two kinds of layers: some whole on the device at few bits, the others mostly in host memory."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import DenseFormat, Format, PackedFormat, Shape
from workbench.kv.stores.offload import Index, OffloadFormat
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace


@dataclass(frozen=True)
class TailoredFormat(Format):
    """Selected entries at `dtype` in every layer; the others of the layers `quantised` at `bits` bits in groups of
    `group`, those of all other layers in host memory, where `index` finds them.

    In quantised layers the newest tokens stay exact while decoding until they fill a group.
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    quantised: frozenset[int]
    bits: int
    group: int
    index: Index
    sinks: int

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (str(self.dtype).removeprefix("torch."), f"{self.bits}-bit or host")

    @property
    def _offloaded(self) -> OffloadFormat:
        return OffloadFormat(self.dtype, self.index, self.sinks)

    @property
    def _packed(self) -> PackedFormat:
        return PackedFormat(self.dtype, self.bits, self.group, residual=self.group)

    def kind(self, shape: Shape) -> Hashable:
        return shape.layer in self.quantised

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        if shape.layer not in self.quantised:
            return self._offloaded.nbytes(shape, selected)
        split = (selected < shape.tokens).any(dim=1)
        rest = self._packed.nbytes(shape, shape.tokens - selected[split]) if bool(split.any()) else 0
        return DenseFormat(self.dtype).nbytes(shape, selected) + rest

    def host_nbytes(self, shape: Shape, selected: Tensor) -> int:
        return 0 if shape.layer in self.quantised else self._offloaded.host_nbytes(shape, selected)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        if layer.index not in self.quantised:
            return self._offloaded.build(layer, tiers, state)
        exact = DenseStore.where(layer.keys, layer.values, tiers == 1, self.dtype)
        if not bool((tiers == 2).any()):
            return exact
        keys, values = layer.keys, layer.values
        rest = PackedStore.where(
            keys, values, tiers == 2, self.dtype, bits=self.bits, group=self.group, residual=self.group
        )
        return SplitStore((rest, exact))  # what is new enters the first
