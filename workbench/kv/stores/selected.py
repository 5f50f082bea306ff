"""Everything is on the device, and each new token attends to the part of it that its query asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Pin
from workbench.kv.stores.format import Format, Shape
from workbench.kv.stores.offload import found_by_products
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Store
from workbench.kv.stores.wrapping import WrappingStore
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged


class Selector(ABC):
    """Chooses the entries of one layer that a query attends to."""

    @abstractmethod
    def choose(self, query: Tensor, order: Tensor, seen: Tensor) -> Tensor:
        """For query [k, g, d] the entries that each of its heads attends to, bool [k, g, m] by slot.

        order int64 [k, m]: the place of each entry among those of its head, by position; seen bool [k, m]: the entries
        that there are to choose from. Every head chooses one at least.
        """

    @property
    @abstractmethod
    def looks_at(self) -> int:
        """For how many things a query computes a score to choose by, over the KV heads of the layer."""

    @abstractmethod
    def append(self, keys: Tensor) -> None:
        """Keys [k, q, d] have joined as the newest of every head."""

    def reserve(self, tokens: int) -> None:  # noqa: B027 (some need nothing)
        """Make room for `tokens` more."""

    @property
    def growing(self) -> Rows | None:
        """Rows into which a captured step writes what it chooses by; None where none can choose."""
        return None

    def room_for(self, tokens: int) -> int:
        """How many more of `growing` so many tokens take, at most."""
        return tokens

    def captured(self, keys: Ragged, values: Ragged) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """For captured steps: from a query [k, g, d], whose own key has joined the others, to what each of its heads
        attends to: keys [h, c, d], values [h, c, dv], and int32 [h, c, 1], 0 where there is an entry and 1 elsewhere.
        """
        raise NotImplementedError

    def follow(self, keys: Tensor, count: int) -> int:
        """Know that the last `count` of all keys held, [k, m, d] in their order, have joined in captured steps, and
        that no more have; returns for how many things in all their queries computed a score (`looks_at`).
        """
        raise NotImplementedError

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What it holds on the device."""

    @abstractmethod
    def clone(self) -> Self:
        """An independent copy."""


class Selection(ABC):
    """How queries select, as data: what that costs, and how to build it."""

    @abstractmethod
    def nbytes(self, shape: Shape, held: Tensor) -> int:
        """Bytes of what is held besides the entries held [l, k] of a layer of this shape, which names the layer."""

    @abstractmethod
    def build(self, layer: LayerTrace, held: Tensor) -> Selector | None:
        """The selector over the positions of a layer at which held [k, n] is True; None: the layer attends to all."""


@dataclass(frozen=True)
class SelectingFormat(Format):
    """Entries as another format stores them, of which queries select."""

    stored: Format
    selection: Selection

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.stored.tiers

    def kind(self, shape: Shape) -> Hashable:
        return shape.layer

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        held = torch.full_like(selected, shape.tokens) if self.keeps_rest else selected
        return self.stored.nbytes(shape, selected) + self.selection.nbytes(shape, held)

    def of_everything(self) -> Format:
        return SelectingFormat(self.stored.of_everything(), self.selection)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        store, selector = self.stored.build(layer, tiers, state), self.selection.build(layer, tiers > 0)
        if selector is None:
            return store
        if layer.scoring.slopes is not None:
            raise found_by_products(layer)
        return SelectingStore(store, selector)


class SelectingStore(WrappingStore):
    """A store of which a token that comes alone attends to what its selector chooses; several that come together, as
    those of a question, attend to everything.
    """

    selects = True

    def __init__(self, inner: Store, selector: Selector) -> None:
        super().__init__(inner)
        self.selector = selector
        self._computed: int | None = None
        self._groups = self._at_once = self._seen = 0
        self._missing = torch.empty(0, dtype=torch.int64)  # entries that each captured step did not find

    @property
    def scores_computed(self) -> int | None:
        return self._computed

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().append(keys, values, positions)
        self.selector.append(keys)

    def reserve(self, tokens: int) -> None:
        super().reserve(tokens)
        self.selector.reserve(tokens)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if query.shape[1] > 1:
            self._computed = None
            return self.inner.attend(query, query_positions, scoring, weights=weights)
        held = self.inner.contents(query.dtype)
        heads, slots, _ = held.keys.shape
        at, positions = query_positions.to(self.device), held.positions.long()  # [k or 1, m]
        seen = positions <= at
        if held.valid is not None:
            seen, positions = seen & held.valid, positions.masked_fill(~held.valid, torch.iinfo(torch.int64).max)
        if scoring.window is not None:
            seen = seen & (positions > at - scoring.window)
        order = positions.argsort(dim=1, stable=True).argsort(dim=1)
        seen, positions, order = (x.expand(heads, -1) for x in (seen, positions, order))
        chosen = self.selector.choose(query.float().view(heads, -1, query.shape[-1]), order, seen)  # [k, g, m]
        counts = chosen.sum(dim=2)
        total, most = torch.stack([counts.sum(), counts.max()]).tolist()
        self._computed = total + chosen.shape[1] * self.selector.looks_at
        where = chosen.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., : max(most, 1)]

        def at_chosen(x: Tensor) -> Tensor:
            wide = x[:, None].expand(-1, chosen.shape[1], -1, -1)
            return wide.gather(2, where[..., None].expand(-1, -1, -1, x.shape[-1])).flatten(0, 1)  # [h, c, d]

        visible = chosen.gather(2, where).flatten(0, 1)[:, None]
        out, rows = attend(
            query,
            at_chosen(held.keys),
            at_chosen(held.values),
            scoring,
            visible=visible,
            offsets=scoring.offsets(at, at_chosen(positions[..., None])[..., 0]),
            weights=weights,
        )
        if rows is None:
            return out, None
        everywhere = rows.new_zeros(*chosen.shape[:2], slots).scatter_(2, where, rows.view_as(where))
        return out, everywhere[:, :, None]

    # -- captured decode steps

    @property
    def capturable(self) -> Capturable | None:
        inner = self.inner.capturable
        return self if inner is not None and inner.period is None and self.selector.growing is not None else None

    @property
    def _inner(self) -> Capturable:
        assert self.inner.capturable is not None
        return self.inner.capturable

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self._inner.growing

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        rows = self.selector.growing
        assert rows is not None
        return [*self._inner.room_for(steps), (rows, self.selector.room_for(steps))]

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self._inner.most_rows(steps)

    @property
    def fixed_nbytes(self) -> int:
        return self._inner.fixed_nbytes

    @property
    def period(self) -> int | None:
        return None

    @property
    def steps_until_settled(self) -> int | None:
        return None

    def settle(self) -> None:
        """Nothing waits."""

    def captured_attention(self, keys: Ragged, values: Ragged, steps: int, pin: Pin) -> CapturedAttention:
        choose, heads = self.selector.captured(keys, values), self.kv_heads
        missing = torch.zeros(steps, dtype=torch.int64, device=self.device)
        begin, newest = pin.position.clone(), torch.zeros(1, dtype=torch.int64, device=self.device)
        self._missing, self._seen = missing, 0

        def attention(query: Tensor, scoring: Scoring) -> Tensor:
            key, value, hidden = choose(query.view(heads, -1, query.shape[2]))
            missing.index_copy_(0, pin.position - begin, hidden.sum()[None])
            self._groups, self._at_once = query.shape[0] // heads, hidden.numel()
            every, behind = (Ragged.of(key), Ragged.of(value)), Ragged.of(hidden)  # as if it stood behind the query
            return decode_dense(query, *every, scoring, query_positions=newest, positions=behind)[0]

        return attention

    def advance(self, positions: Tensor) -> None:
        self._inner.advance(positions)
        count = positions.numel()
        chosen = count * self._at_once - int(self._missing[self._seen : self._seen + count].sum())
        self._computed = chosen + self._groups * self.selector.follow(self._inner.growing[0].view(), count)
        self._seen += count

    def tensors(self) -> dict[str, list[Tensor]]:
        return {**self.inner.tensors(), "selection": self.selector.tensors()}

    def clone(self) -> Self:
        twin = copy(self)
        twin.inner, twin.selector = self.inner.clone(), self.selector.clone()
        return twin
