"""Every key on the device, some values in host memory: exact scores, of which the largest fetch their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, index_nbytes, left_over
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.offload import QUERIES_AT_ONCE, OffloadStore, Retriever
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, joined_slots, seen_by
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend


@dataclass(frozen=True)
class HostValuesFormat(Format):
    """Selected entries whole on the device; of all others the keys there and the values in host memory.

    fetch: how many of those values each query of a KV head gets. sinks, recent: as in `OffloadFormat`.
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    fetch: int
    sinks: int = 4
    recent: int = 32

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (str(self.dtype).removeprefix("torch."), "values in host memory")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        others = left_over(shape, selected)
        keys = int(others.sum()) * (shape.key_width * shape.itemsize + INDEX_BYTES) + 2 * index_nbytes(others)
        return DenseFormat(self.dtype).nbytes(shape, selected) + keys

    def host_nbytes(self, shape: Shape, selected: Tensor) -> int:
        others = left_over(shape, selected)
        return int(others.sum()) * (shape.value_width * shape.itemsize + INDEX_BYTES) + 3 * index_nbytes(others)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        near = DenseStore.where(layer.keys, layer.values, tiers == 1, self.dtype)
        others = tiers == 2
        if not bool(others.any()):
            return near
        far = HostRows.where(layer.keys[..., :0], layer.values, others, self.dtype)
        where = torch.arange(layer.tokens, device=layer.device).expand(layer.kv_heads, -1)[..., None]
        keys = _Keys(Rows.where(layer.keys, others, self.dtype), Rows.where(where, others, torch.int32))
        return HostValuesStore(near, far, keys, self.sinks, near.longest, self.recent, self.fetch)


class _Keys(Retriever):
    """The keys of what is far, and their positions."""

    def __init__(self, keys: Rows, positions: Rows) -> None:
        self.keys, self.positions = keys, positions

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the store ranks by its own softmax, in which what is near takes part")

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys.append(keys)
        self.positions.append(positions.to(torch.int32)[..., None])

    def tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.positions.tensors()]

    def clone(self) -> _Keys:
        return _Keys(self.keys.clone(), self.positions.clone())


class HostValuesStore(OffloadStore):
    """The softmax runs over all keys; of the values in host memory only the `fetch` with most weight are added up."""

    retriever: _Keys

    def __init__(
        self, near: DenseStore, far: HostRows, keys: _Keys, sinks: int, usual: int, recent: int, fetch: int
    ) -> None:
        super().__init__(near, far, keys, sinks, usual, recent)
        self.fetch = fetch

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        near, far = self.near.contents(query.dtype), self.retriever
        count = near.keys.shape[1]
        keys = torch.cat([near.keys, far.keys.view().to(query.dtype)], dim=1)  # [k, m, d]
        positions, valid = self.slots()
        outs = []
        for part, at in zip(query.split(QUERIES_AT_ONCE, dim=1), query_positions.split(QUERIES_AT_ONCE), strict=True):
            _, rows = attend(
                part,
                keys,
                keys[..., :0],  # the values are not all here
                scoring,
                visible=seen_by(at, positions, valid, scoring),
                offsets=scoring.offsets(at, positions),
                weights=True,
            )
            assert rows is not None  # [k, g, q, m]
            there = rows[..., count:].sum(dim=1)  # [k, q, far]
            slots = there.topk(min(self.fetch, there.shape[-1]), dim=-1).indices
            slots, chosen = self.distinct(slots, torch.ones_like(slots, dtype=torch.bool))
            wait = self.far.fetch_values(slots)
            out = rows[..., :count].to(query.dtype) @ near.values[:, None]
            picked = rows[..., count:].gather(3, slots[:, None, None].expand(*rows.shape[:3], -1)) * chosen[:, None]
            out = out + picked.to(query.dtype) @ wait().to(query.dtype)[:, None]
            outs.append(out.flatten(0, 1))  # [h, q, dv]
        return torch.cat(outs, dim=1), None

    def contents(self, dtype: torch.dtype) -> Dequantised:
        near = self.near.contents(dtype)
        return Dequantised(
            torch.cat([near.keys, self.retriever.keys.view().to(dtype)], dim=1),
            torch.cat([near.values, self.far.values.view().to(near.values.device, dtype)], dim=1),
            *self.slots(),
        )

    def slots(self) -> tuple[Tensor, Tensor | None]:
        far = self.retriever
        parts = [self.near.slots(), (far.positions.view()[..., 0], far.keys.valid())]
        return joined_slots(parts, self.kv_heads, self.device)

    def tensors(self) -> dict[str, list[Tensor]]:
        tensors = self.near.tensors()
        name = next(iter(tensors))
        return {name: [*tensors[name], *self.retriever.tensors()]}

    def clone(self) -> Self:
        parts = self.near.clone(), self.far.clone(), self.retriever.clone()
        return type(self)(*parts, self.sinks, self.usual, self.recent, self.fetch)
