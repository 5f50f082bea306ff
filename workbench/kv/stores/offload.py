"""A part of the cache on the device, the rest in host memory, from where each query fetches what an index finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.errors import NotApplicable
from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Pin
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import DenseFormat, Format, Shape, left_over
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.recomputed import Recomputing, far_nbytes
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, seen_by
from workbench.kv.stores.tiered import TieredStore
from workbench.measure.memory import tensor_bytes
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import merge_states

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

    capturable: ClassVar[bool] = False  # `captured` finds without waiting for the device, from keys alone

    @property
    def growing(self) -> tuple[Rows, ...]:
        """Rows on the device that entries join which move to host memory."""
        return ()

    def captured(self, steps: int, pin: Pin) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
        """For a captured step: `find` for one query [h, 1, d] at `pin.position`, for so many steps; for a class that is
        `capturable`.
        """
        raise NotImplementedError

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


def merged(near: tuple[Tensor, Tensor | None], far: tuple[Tensor, Tensor | None]) -> Tensor:
    """Attention over what is near and what is far, of the states of both."""
    (out, near_lse), (other, far_lse) = near, far
    assert near_lse is not None
    assert far_lse is not None
    return merge_states([(out, near_lse), (other, far_lse)])


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

    # -- captured decode steps, between which the oldest move out

    @property
    def capturable(self) -> Capturable | None:
        fits = self.retriever.capturable and self.far.capturable and self.near.capturable is not None
        return self if fits else None

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.near.growing

    @property
    def _until_full(self) -> int:
        """How many more may be near before some move out."""
        return max(self.usual + self.recent - self.near.longest, 0)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        near = min(steps, max(self._until_full, self.recent))
        return [
            *((rows, min(more, near)) for rows, more in self.near.room_for(steps)),
            *((rows, steps + self.recent) for rows in self.retriever.growing),
        ]

    def most_rows(self, steps: int) -> tuple[int, int]:
        keys, values = self.near.most_rows(min(steps, max(self._until_full, self.recent)))
        return keys, values

    @property
    def fixed_nbytes(self) -> int:
        return tensor_bytes(self.index()) - tensor_bytes(x for rows in self.retriever.growing for x in rows.tensors())

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return self._until_full

    def settle(self) -> None:
        """Let the oldest move out if they would before the next token."""
        if not self._until_full:
            self._move_out(self.near.longest + 1 - self.usual)

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        self.far.reserve(steps + self.recent)
        find = self.retriever.captured(steps + self.recent, pin)

        def attention(query: Tensor, scoring: Scoring) -> Tensor:
            near = decode_dense(query, keys, values, scoring, lse=True)
            return merged(near, self._far_state(query, *find(query, scoring.scale), scoring))

        return attention

    def advance(self, positions: Tensor) -> None:
        self.near.advance(positions)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        newest = self._newest(query, query_positions, scoring)
        if newest is not None:
            return newest, None
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

    def _newest(self, query: Tensor, at: Tensor, scoring: Scoring) -> Tensor | None:
        """Attention of the newest token by kernels; None where there are none for it."""
        if query.shape[1] > 1 or scoring.window is not None or self.retriever.observes:
            return None
        near = self.near.state_by_kernel(query, at, scoring)
        if near is None:
            return None
        far = self._far_state(query, *self.retriever.find_at(query, at, scoring.scale), scoring)
        self.far.release()
        return merged(near, far)

    def _far_state(
        self, query: Tensor, slots: Tensor, counts: Tensor, scoring: Scoring
    ) -> tuple[Tensor, Tensor | None]:
        """The state of attention of one query over those entries in slots [k, 1, c] that count."""
        slots, counts = slots[:, 0], counts[:, 0]
        keys, values, _ = self.far.fetch(slots.masked_fill(~counts, -1))()
        hidden = (~counts).to(torch.int32)[..., None]  # as if they stood behind the query
        return decode_dense(
            query,
            Ragged.of(self.as_numbers(keys, query.dtype)),
            Ragged.of(self.as_numbers(values, query.dtype)),
            scoring.without_sinks(),
            query_positions=torch.zeros(1, dtype=torch.int64, device=query.device),
            positions=Ragged.of(hidden),
            lse=True,
        )

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
