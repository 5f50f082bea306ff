"""A part of the cache on the device, the rest in host memory, every number of both at 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from workbench.core.precision import checked
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, index_nbytes, left_over
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.offload import Index, OffloadStore
from workbench.kv.stores.recomputed import Recomputing, far_nbytes
from workbench.kv.stores.store import Dequantised, Store
from workbench.trace import LayerTrace
from workbench_kernels import dequantise, quantise

NAME = "8-bit"
_EXTRA = 4  # bytes of a row's scale and zero


@dataclass(frozen=True)
class EightBitOffloadFormat(Format):
    """`OffloadFormat` with every entry, near or far, at 8 bits; a layer of which all is near stays at `dtype`.

    Each entry's key, and its value, has a scale and a zero of its own, so entries can move one by one.
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    index: Index
    sinks: int = 0
    recent: int = 32
    recomputing: Recomputing | None = None

    tiers = (NAME, "host")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        split = (selected < shape.tokens).any(dim=1)
        some = selected[split]
        if not len(some):
            return DenseFormat(self.dtype).nbytes(shape, selected)
        near = int(some.sum()) * (_entry_nbytes(shape) + INDEX_BYTES) + 3 * index_nbytes(some)
        index = self.index.nbytes(shape, shape.tokens - some)
        return DenseFormat(self.dtype).nbytes(shape, selected[~split]) + near + index

    def host_nbytes(self, shape: Shape, selected: Tensor) -> int:
        others = left_over(shape, selected)
        if not len(others):
            return 0
        entries = far_nbytes(shape, selected, _entry_nbytes(shape), self.recomputing)
        return entries + self.index.host_nbytes(shape, others)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        others = tiers == 2
        if not bool(others.any()):
            return DenseStore.where(layer.keys, layer.values, tiers == 1, self.dtype)
        for what, x in (("keys", layer.keys), ("values", layer.values)):
            for end in (x.amin(dim=-1), x.amax(dim=-1) / 255):  # become float16 among the bytes, where nobody looks
                checked(end, torch.float16, f"layer {layer.called}: {what} in eight bits")
        keys, values = to_bytes(layer.keys), to_bytes(layer.values)
        near = DenseStore.where(keys, values, tiers == 1, torch.uint8)
        if self.recomputing is None:
            far = HostRows.where(keys, values, others, torch.uint8)
        else:
            far = self.recomputing.rows(layer, others, to_bytes, torch.uint8)
        index = self.index.build(layer, others)
        return EightBitOffloadStore(near, far, index, self.sinks, near.longest, self.recent)


class EightBitOffloadStore(OffloadStore):
    """Entries move between the device and host memory as the bytes they were stored as."""

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().append(to_bytes(keys), to_bytes(values), positions)

    def near_contents(self, dtype: torch.dtype) -> Dequantised:
        near = self.near.contents(torch.uint8)
        return replace(near, keys=to_numbers(near.keys, dtype), values=to_numbers(near.values, dtype))

    def as_numbers(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return to_numbers(rows, dtype)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        rows = super().contents(torch.uint8)
        return replace(rows, keys=to_numbers(rows.keys, dtype), values=to_numbers(rows.values, dtype))

    def tensors(self) -> dict[str, list[Tensor]]:
        return _named(super().tensors())

    def host_tensors(self) -> dict[str, list[Tensor]]:
        return _named(super().host_tensors())


def to_bytes(x: Tensor) -> Tensor:
    """Numbers x [..., d] as bytes [..., d + 4]: their codes between the row's extremes, then its scale and zero."""
    codes, scale, zero = quantise(x, 8)
    return torch.cat([codes, torch.stack([scale, zero], dim=-1).view(torch.uint8)], dim=-1)


def to_numbers(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What bytes [..., d + 4] stand for, [..., d]."""
    scale, zero = rows[..., -_EXTRA:].contiguous().view(torch.float16).unbind(dim=-1)
    return dequantise(rows[..., :-_EXTRA], scale, zero, dtype)


def _entry_nbytes(shape: Shape) -> int:
    return shape.key_width + shape.value_width + 2 * _EXTRA


def _named(by_precision: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {NAME if name == "uint8" else name: tensors for name, tensors in by_precision.items()}
