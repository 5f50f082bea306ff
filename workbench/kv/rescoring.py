"""Leaving while decoding by the scores of any method: what is held is scored anew whenever room is needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.kv.base import Holding, KVMethod, Stages, Study
from workbench.kv.held import HeldLayer, scores_by_slot, view
from workbench.kv.ranking import for_all_heads
from workbench.kv.stores.capabilities import AHEAD, Capturable, CapturedAttention, Droppable, Pin, Rescored
from workbench.kv.stores.format import INDEX_BYTES, Format, Shape
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store
from workbench.kv.stores.wrapping import WrappingStore
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged

_FAR = 1024  # steps after which who leaves is asked again where nobody is to leave before


@dataclass(frozen=True)
class Rescoring:
    """Who decides while decoding: `evicting` when and how many leave, `scoring` which of them, `merging` what becomes
    of them, None where nothing does.
    """

    evicting: KVMethod
    scoring: KVMethod
    merging: KVMethod | None = None

    def check(self, layer: LayerTrace) -> None:
        """Raise NotApplicable where the scorer needs queries, of which none will be held."""
        if self.evicting.observes:
            return
        some = slice(0, min(layer.tokens, 8))
        where = torch.arange(layer.tokens, device=layer.device)[some].expand(layer.kv_heads, -1)
        nothing = layer.queries[:, :0], where[0, :0]
        held = view(layer, layer.keys[:, some], layer.values[:, some], where, where, *nothing)
        self.evicting.rescore(held, self.scoring, Holding(*[held.tokens] * 5))


def observing(study: Study, stages: Stages, dtype: torch.dtype) -> Callable[[Format], Format]:
    """From how entries are stored to how they are where some leave by the recipe's scores while decoding; where none
    does, the same. Raises NotApplicable where the scorer needs queries and none are to be held.
    """
    if stages.evict is None or not stages.evict.rescores:
        return lambda form: form
    assert stages.score is not None
    layer = study.trace.compressible[0]
    rescoring = Rescoring(stages.evict, stages.score, stages.merge)
    rescoring.check(layer)

    def observed(form: Format) -> Format:
        droppable = form.droppable()
        assert droppable is not None
        return ObservedFormat(droppable, rescoring, layer.heads, layer.keys_held.shape[-1], dtype)

    return observed


@dataclass(frozen=True)
class _Ring:
    """Queries [h, r, d] of captured steps, each over the oldest: more than are held, for some may be taken back.

    That of position p is in place p modulo r.
    """

    queries: Tensor

    @classmethod
    def of(cls, queries: Tensor, begin: int) -> _Ring:
        """One that goes on from queries [h, w, d], the newest last, with one at position `begin`."""
        room = queries.new_zeros(queries.shape[0], AHEAD, queries.shape[2])
        both = torch.cat([queries, room], dim=1)
        return cls(both.roll(begin - queries.shape[1], dims=1))

    def take(self, query: Tensor, position: Tensor) -> None:
        """Let query [h, 1, d] at position int64 [1] join, on the device."""
        place = position.remainder(self.queries.shape[1])
        self.queries.index_copy_(1, place, query.to(self.queries.dtype))

    def newest(self, count: int, end: int) -> Tensor:
        """The `count` queries before position `end`, [h, count, d]."""
        places = torch.arange(end - count, end, device=self.queries.device).remainder(self.queries.shape[1])
        return self.queries[:, places]


@dataclass(frozen=True)
class ObservedFormat(Format):
    """Another format, of whose entries some leave while decoding, with the last queries of each layer beside them:
    `heads` of this `width`.
    """

    inner: Format
    rescoring: Rescoring
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.tiers

    def kind(self, shape: Shape) -> Hashable:
        return self.inner.kind(shape)

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        return self.inner.nbytes(shape, selected) + len(selected) * self.beside(shape)

    def beside(self, shape: Shape) -> int:
        return self.rescoring.evicting.observes * (self.heads * self.width * shape.itemsize + INDEX_BYTES)

    def of_everything(self) -> Format:
        return self.inner.of_everything() if self.inner.exact else self  # rounded, it has a budget

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        count = self.rescoring.evicting.observes
        seen = min(count, layer.tokens)
        queries = torch.zeros(layer.heads, count, layer.keys_held.shape[2], dtype=self.dtype, device=layer.device)
        asked = torch.full((count,), -1, dtype=torch.int32, device=layer.device)
        if seen:
            queries[:, count - seen :] = layer.queries[:, layer.tokens - seen :].to(self.dtype)
            asked[count - seen :] = torch.arange(layer.tokens - seen, layer.tokens, device=layer.device)
        inner = self.inner.build(layer, tiers, state)
        return ObservedStore(inner, self.rescoring, layer.blank(0), queries, asked)


class ObservedStore(WrappingStore):
    """Another store, with the last queries that were asked of it: when room is needed, what is held is scored anew.

    queries [h, w, d], the newest last, at positions asked int32 [w], -1 where none has been asked yet.
    """

    def __init__(self, inner: Store, rescoring: Rescoring, layer: LayerTrace, queries: Tensor, asked: Tensor) -> None:
        """layer: without data."""
        assert inner.droppable is not None
        super().__init__(inner)
        self.rescoring, self.layer = rescoring, layer
        self.queries, self.asked = queries, asked
        self.begun: tuple[int, int] | None = None  # entries of the shortest head, and tokens, before the first pass
        self.capacity = 0  # entries of the longest head that it began with, or may grow to
        self.tokens: int | None = None  # read before this pass, and with it; None: not told yet
        self._then: int | None = None
        self._ring: _Ring | None = None
        self._known: tuple[int, int, int] | None = None

    def reads(self, ids: Tensor, positions: Tensor) -> None:
        self.tokens, self._then = self._then, int(positions[-1]) + 1

    @property
    def _inner(self) -> Droppable:
        assert self.inner.droppable is not None
        return self.inner.droppable

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        self._ring = None
        self._observe(query, query_positions)
        return self.inner.attend(query, query_positions, scoring, weights=weights)

    def _observe(self, query: Tensor, positions: Tensor) -> None:
        """Remember query [h, q, d] at positions [q] in place of the oldest."""
        count = self.asked.numel()
        if count:
            self.queries.copy_(torch.cat([self.queries, query.to(self.queries.dtype)], dim=1)[:, -count:])
            asked = positions.to(self.asked.device, self.asked.dtype)
            self.asked.copy_(torch.cat([self.asked, asked])[-count:])

    def tensors(self) -> dict[str, list[Tensor]]:
        by_precision = {name: list(tensors) for name, tensors in self.inner.tensors().items()}
        exact = str(self.queries.dtype).removeprefix("torch.")
        by_precision.setdefault(exact, []).extend([self.queries, self.asked])
        return by_precision

    def clone(self) -> Self:
        twin = copy(self)
        twin.inner, twin.queries, twin.asked = self.inner.clone(), self.queries.clone(), self.asked.clone()
        return twin

    # -- leaving while decoding

    @property
    def rescored(self) -> Rescored | None:
        return self

    @property
    def longest(self) -> int:
        """Entries of the head that has most."""
        return self._inner.longest

    @property
    def shortest(self) -> int:
        """Entries of the head that has fewest."""
        return self._inner.shortest

    def make_room(self, room: int) -> None:
        """Let entries leave so that each head has room for as many more; those of the lowest scores, of equals the
        oldest.
        """
        tokens = int(self.slots()[0].max()) + 1 if self.tokens is None else self.tokens
        if self.begun is None:
            self.begun, self.capacity = (self.shortest, tokens), self.rescoring.evicting.holds(self.longest)
        while entries := self.shortest:
            holding = Holding(entries, room, tokens, *self.begun)
            leaving = self.rescoring.evicting.leaving_at_once(holding)
            if leaving <= 0:
                return
            if leaving > entries:
                raise BudgetTooSmall("the cache is too small to take in a new token; use a larger budget", 0.0)
            self._evict(leaving, holding)
            room -= leaving

    # -- captured decode steps, between which entries leave

    @property
    def capturable(self) -> Capturable | None:
        inner = self.inner.capturable
        return self if inner is not None and inner.period is None and self.begun is not None else None

    @property
    def _captured(self) -> Capturable:
        assert self.inner.capturable is not None
        return self.inner.capturable

    def _leaving_ahead(self, steps: int) -> Iterator[int]:
        """Before each of so many tokens, how many entries leave."""
        assert self.begun is not None
        tokens = self._then or int(self.slots()[0].max()) + 1
        entries, spread = self.shortest, self.longest - self.shortest
        for step in range(steps):
            before = entries
            while entries:
                holding = Holding(entries, entries + spread + 1 - self.capacity, tokens + step, *self.begun)
                leaving = self.rescoring.evicting.leaving_at_once(holding)
                if leaving <= 0:
                    break
                entries -= leaving
            yield before - entries
            entries += 1

    def _more(self, steps: int) -> int:
        """By how many entries a head is larger at most while so many tokens come."""
        if not self._known or self._known[:2] != (steps, self.shortest):
            sizes = accumulate(1 - leaving for leaving in self._leaving_ahead(steps))
            self._known = steps, self.shortest, max(sizes, default=0)
        return self._known[2]

    def schedule(self, steps: int) -> Iterator[tuple[int, int]] | None:
        """For each of so many tokens the row that it comes to in every head, and how many rows there are then; None
        where it takes scores to tell, or heads differ.
        """
        rescoring, (where, valid) = self.rescoring, self.slots()
        if not rescoring.evicting.evicts_by_rank or rescoring.merging is not None or valid is not None:
            return None
        if bool((where != where[:1]).any()):
            return None
        return self._scheduled(steps, where[0].argsort().tolist())

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions."""
        return self._inner.placed

    def follow(self, last: int, more: int) -> None:
        """Know of tokens up to position `last`, whose rows, `more` than there were, are all written."""
        for rows in (*self.growing, *self.placed):
            rows.grow(more)
        self.tokens = self._then = last + 1

    def _scheduled(self, steps: int, slots: list[int]) -> Iterator[tuple[int, int]]:
        """From slots in the order of their positions. Raises NotApplicable where several leave for one that comes."""
        ranks: dict[int, int] = {}
        for leaving in self._leaving_ahead(steps):
            if leaving > 1:
                raise NotApplicable(f"{self.rescoring.evicting.key} lets {leaving} entries go for one that comes")
            held = len(slots)
            if leaving and held not in ranks:
                ranks[held] = self._rank(held)
            slots.append(slots.pop(ranks[held]) if leaving else held)
            yield slots[-1], len(slots)

    def _rank(self, entries: int) -> int:
        """The place by position, among so many entries, of the one that leaves first."""
        assert self.begun is not None
        where, nothing = torch.arange(entries)[None], torch.empty(1, entries, 0)
        layer = replace(self.layer, scoring=self.layer.scoring.of(slice(0, 1)))
        held = view(layer, nothing, nothing, where, where, nothing[:, :0], where[0, :0])
        room = entries + 1 - self.capacity
        scores = self._scores(held, Holding(entries, room, int(self._then or 0), *self.begun))
        return int(scores[0].argsort(stable=True)[0])

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self._captured.growing

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        most = self._more(steps)
        return [(rows, min(more, most)) for rows, more in self._captured.room_for(steps)]

    def most_rows(self, steps: int) -> tuple[int, int]:
        most = self._more(steps)
        keys, values = self._captured.growing
        return keys.longest + most, values.longest + most

    @property
    def fixed_nbytes(self) -> int:
        each = self.queries.nbytes // max(self.asked.numel(), 1)
        return (
            self._captured.fixed_nbytes + self.queries.nbytes + self.asked.nbytes + each * (self.asked.numel() + AHEAD)
        )

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return next((step for step, leaving in enumerate(self._leaving_ahead(_FAR)) if leaving), _FAR)

    def settle(self) -> None:
        """Let those leave that would before the next token."""
        self.tokens = self._then
        self.make_room(self.longest + 1 - self.capacity)

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        inner = self._captured.captured_attention(keys, values, steps, pin)
        if not self.asked.numel():
            return inner
        ring = _Ring.of(self.queries, self._then or 0)
        self._ring = ring

        def attention(query: Tensor, scoring: Scoring) -> Tensor:
            ring.take(query, pin.position)
            return inner(query, scoring)

        return attention

    def advance(self, positions: Tensor) -> None:
        self._captured.advance(positions)
        self.tokens = self._then = int(positions[-1]) + 1
        count, new = self.asked.numel(), positions[-self.asked.numel() :]
        if self._ring is not None:
            self.queries.copy_(self._ring.newest(count, self._then))
            asked = new.to(self.asked.device, self.asked.dtype)
            self.asked.copy_(torch.cat([self.asked, asked])[-count:])

    def _evict(self, leaving: int, holding: Holding) -> None:
        held = self.inner.contents(self.queries.dtype)
        kept = self.asked >= 0
        queries, asked = self.queries[:, kept], self.asked[kept].long()
        scores = scores_by_slot(self.layer, held, queries, asked, lambda layer: self._scores(layer, holding))
        if held.valid is not None:
            scores = scores.masked_fill(~held.valid, torch.inf)
        if self.holds_latents:  # rows that all heads share
            scores = for_all_heads(scores)
        where = held.positions.expand_as(scores)
        if held.valid is not None:  # what holds nothing stands behind all that does
            where = where.masked_fill(~held.valid, torch.iinfo(where.dtype).max)
        oldest_first = where.argsort(dim=1, stable=True)
        order = scores.gather(1, oldest_first).argsort(dim=1, stable=True)[:, :leaving]
        slots = oldest_first.gather(1, order)
        if self.rescoring.merging is not None:
            self._merge(held, scores, slots, queries, asked)
        self._inner.evict(slots)

    def _scores(self, layer: HeldLayer, holding: Holding) -> Tensor:
        scores = self.rescoring.evicting.rescore(layer, self.rescoring.scoring, holding)
        if scores.isnan().any():
            raise NotApplicable(f"{self.rescoring.scoring.key}: its scores of what is held are not numbers")
        return scores.float()

    def _merge(self, held: Dequantised, scores: Tensor, slots: Tensor, queries: Tensor, asked: Tensor) -> None:
        """Let what is in slots [k, e] go into what stays."""
        merging, rewritable = self.rescoring.merging, self.inner.rewritable
        assert merging is not None
        assert rewritable is not None
        leaves = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, slots, True)
        keys, values, heads = held.keys.float(), held.values.float(), held.keys.shape[0]
        where = held.positions.expand(heads, -1).long()
        parts: Sequence[tuple[slice, Tensor]]
        if held.valid is None:
            parts = [(slice(None), where.argsort(dim=1))]
        else:
            real = [row.nonzero()[:, 0] for row in held.valid]
            parts = [(slice(h, h + 1), at[where[h, at].argsort()][None]) for h, at in enumerate(real)]
        group = queries.shape[0] // heads
        for part, order in parts:
            shared = slice(None) if held.valid is None else slice(part.start * group, part.stop * group)
            asking, blank = queries[shared], replace(self.layer, scoring=self.layer.scoring.of(shared))
            layer = view(blank, held.keys[part], held.values[part], where[part], order, asking, asked)
            merged = merging.merge(layer, ~leaves[part].gather(1, order), scores[part].gather(1, order))
            for whole, x in zip((keys, values), merged, strict=True):
                whole[part] = whole[part].scatter(1, order[..., None].expand_as(x), x.float())
        rewritable.rewrite(keys, values)
