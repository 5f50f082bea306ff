"""A part of the cache on the device, the rest in host memory, from where each query fetches what an index finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.errors import NotApplicable
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import DenseFormat, Format, Shape, left_over
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.recomputed import Recomputing, far_nbytes
from workbench.kv.stores.store import Dequantised, Store, seen_by
from workbench.kv.stores.tiered import TieredStore
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend

QUERIES_AT_ONCE = 16  # queries that fetch together: bounds what is copied for a long question


class Retriever(ABC):
    """Finds the entries of one layer's host memory that a query needs; entries are numbered by their slot there."""

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """For query [h, q, d], as attention gets it: slots int64 [k, q, c], and which of them count, bool [k, q, c].

        A head's slots of one query are distinct where they count. All are within the longest head's length.
        """
        raise NotImplementedError

    def find_at(self, query: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The same for queries at positions [q]; override this instead of `find` where positions matter."""
        return self.find(query, scale)

    def reads(self, ids: Tensor, positions: Tensor) -> None:  # noqa: B027 (most go by keys alone)
        """Know the tokens, ids [q] at positions [q], whose keys come and whose queries ask next."""

    @abstractmethod
    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Entries [k, e, d], [k, e, dv] at positions [k, e] have moved to the next slots of host memory."""

    follows_slopes: ClassVar[bool] = False  # finds what is wanted in models with slopes of positions (ALiBi) too

    observes: ClassVar[bool] = False  # wants to know what queries gave to the entries that they attended to

    def observe(self, weights: Tensor, positions: Tensor) -> None:  # noqa: B027 (most need no feedback)
        """What queries gave to the entries they attended to; computed only for a class that `observes`.

        weights: softmax rows float32 [k, g, q, m], 0 for what a query did not see; positions: int64 [k, m].
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What the index holds on the device."""

    def host_tensors(self) -> list[Tensor]:
        """What it holds in host memory."""
        return []

    @abstractmethod
    def clone(self) -> Self:
        """An independent copy."""


class Index(ABC):
    """How entries in host memory are indexed, as data: what it costs, and how to build it.

    others [l, k]: how many entries each head has in host memory, of l layers of one shape.
    """

    @abstractmethod
    def nbytes(self, shape: Shape, others: Tensor) -> int:
        """Bytes of the index on the device."""

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        """Bytes of the index in host memory."""
        return 0

    @abstractmethod
    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        """The index over the positions of a layer at which others [k, n] is True, head after head in their order."""


@dataclass(frozen=True)
class OffloadFormat(Format):
    """Selected entries on the device at `dtype`, all others in host memory with an index over them.

    recent: while decoding, the device part grows by so many entries a head; then its oldest, but for the first `sinks`
    positions, move to host memory until it is as large as planned. recomputing: which of them are not held even there.
    """

    attends_itself: ClassVar[bool] = True

    dtype: torch.dtype
    index: Index
    sinks: int = 4
    recent: int = 32
    recomputing: Recomputing | None = None

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (str(self.dtype).removeprefix("torch."), "host")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        others = left_over(shape, selected)
        index = self.index.nbytes(shape, others) if len(others) else 0
        return DenseFormat(self.dtype).nbytes(shape, selected) + index

    def host_nbytes(self, shape: Shape, selected: Tensor) -> int:
        others = left_over(shape, selected)
        if not len(others):
            return 0
        entries = far_nbytes(shape, selected, shape.entry_nbytes, self.recomputing)
        return entries + self.index.host_nbytes(shape, others)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        near = DenseStore.where(layer.keys, layer.values, tiers == 1, self.dtype)
        others = tiers == 2
        if not bool(others.any()):
            return near
        if self.recomputing is None:
            far = HostRows.where(layer.keys, layer.values, others, self.dtype)
        else:
            far = self.recomputing.rows(layer, others, lambda x: x, self.dtype)
        retriever = self.index.build(layer, others)
        if layer.scoring.slopes is not None and not retriever.follows_slopes:
            raise found_by_products(layer)
        return OffloadStore(near, far, retriever, self.sinks, near.longest, self.recent)


def found_by_products(layer: LayerTrace) -> NotApplicable:
    """The refusal where entries are looked for by their products with queries, which are not all of their scores."""
    return NotApplicable(
        f"layer {layer.index}: this model adds slopes of positions to its scores (ALiBi), and what a query needs is "
        "looked for by products alone"
    )


class OffloadStore(TieredStore):
    """Entries on the device (`near`), where new tokens enter too, and entries in host memory (`far`).

    A query attends to all that is near and to what the retriever finds for it. When `recent` entries a head more than
    `usual` would be near, the oldest, but not the first `sinks` positions, move to host memory.
    """

    def __init__(
        self, near: DenseStore, far: HostRows, retriever: Retriever, sinks: int, usual: int, recent: int
    ) -> None:
        self.near, self.far, self.retriever = near, far, retriever
        self.sinks, self.usual, self.recent = sinks, usual, recent

    def reads(self, ids: Tensor, positions: Tensor) -> None:
        self.retriever.reads(ids, positions)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        excess = self.near.longest + keys.shape[1] - self.usual
        if excess > self.recent:
            self._move_out(excess)
        self.near.append(keys, values, positions)

    def _move_out(self, count: int) -> None:
        """Move the `count` oldest entries of each head that may go."""
        near = self.near.contents(self.near.keys.data.dtype)
        positions = near.positions.expand(near.keys.shape[0], -1)
        age = torch.where(positions < self.sinks, torch.iinfo(torch.int64).max, positions.long())
        if near.valid is not None:
            age = age.masked_fill(~near.valid, torch.iinfo(torch.int64).max)
        movable = (age < torch.iinfo(torch.int64).max).sum(dim=1)
        count = min(count, int(movable.min()))
        if count <= 0:
            return
        slots = age.argsort(dim=1, stable=True)[:, :count]  # [k, e], oldest first

        def at(x: Tensor) -> Tensor:
            return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))

        moved = (at(near.keys), at(near.values), positions.gather(1, slots).long())
        self.far.append(*moved)
        self.retriever.add(*moved)
        self.near.evict(slots)

    def reserve(self, tokens: int) -> None:
        self.near.reserve(min(tokens, max(self.usual + self.recent - self.near.longest, 0)))

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        outs = []
        for part, at in zip(query.split(QUERIES_AT_ONCE, dim=1), query_positions.split(QUERIES_AT_ONCE), strict=True):
            slots, chosen = self.distinct(*self.retriever.find_at(part, at, scoring.scale))
            wait = self.far.fetch(slots)
            near = self.near_contents(query.dtype)
            seen = seen_by(at, near.positions, near.valid, scoring)
            keys, values, positions = wait()
            if scoring.window is not None:
                chosen = chosen & (positions[:, None] > at[None, :, None] - scoring.window)
            shape = (near.keys.shape[0], len(at), near.keys.shape[1])
            seen = torch.ones(shape, dtype=torch.bool, device=query.device) if seen is None else seen.expand(shape)
            out, rows = attend(
                part,
                torch.cat([near.keys, self.as_numbers(keys, query.dtype)], dim=1),
                torch.cat([near.values, self.as_numbers(values, query.dtype)], dim=1),
                scoring,
                visible=torch.cat([seen, chosen], dim=2),
                offsets=scoring.offsets(at, torch.cat([near.positions.expand(len(positions), -1), positions], dim=1)),
                weights=self.retriever.observes,
            )
            outs.append(out)
            if rows is not None:
                there = near.positions.expand(len(positions), -1).long()
                self.retriever.observe(rows, torch.cat([there, positions], dim=1))
        self.far.release()
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)), None

    def near_contents(self, dtype: torch.dtype) -> Dequantised:
        """What is on the device, as `dtype`."""
        return self.near.contents(dtype)

    def as_numbers(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., w] as they are held, as keys or values of `dtype`."""
        return rows.to(dtype)

    def distinct(self, slots: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Of slots [k, q, c] found by several queries: each once, int64 [k, u], and whose it is, bool [k, q, u]."""
        kv_heads, queries, _ = slots.shape
        if queries == 1:
            return slots[:, 0], counts
        wanted = torch.zeros(kv_heads, queries, self.far.longest + 1, dtype=torch.bool, device=slots.device)
        wanted.scatter_(2, torch.where(counts, slots, self.far.longest), True)
        wanted = wanted[..., :-1]
        any_of = wanted.any(dim=1)  # [k, m]
        most = int(any_of.sum(dim=1).max())
        united = any_of.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return united, wanted.gather(2, united[:, None].expand(-1, queries, -1))

    def index(self) -> list[Tensor]:
        return self.retriever.tensors()

    def host_index(self) -> list[Tensor]:
        return self.retriever.host_tensors()

    def clone(self) -> Self:
        parts = self.near.clone(), self.far.clone(), self.retriever.clone()
        return type(self)(*parts, self.sinks, self.usual, self.recent)
