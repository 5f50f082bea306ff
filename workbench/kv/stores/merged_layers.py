"""Neighbouring layers in pairs that hold one direction for each key and value, and a length for each layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.dense import whole_rows
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, state
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.decode import decode_dense
from workbench_kernels.rows import Ragged

_BLOCK = 32  # tokens that wait in captured steps to be merged
_LEAST = 1e-6  # sine of an angle below which directions are mixed in a straight line


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """The angles between vectors [..., d], 0 to pi, float32 [...]."""
    cosine = torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1))


def between(first: Tensor, second: Tensor, towards: float) -> Tensor:
    """The direction on the arc from first to second [..., d], at the share `towards` of it: length 1, float32."""
    first, second = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (first, second))
    angle = angle_between(first, second)[..., None]
    sine = angle.sin()
    arc = (((1 - towards) * angle).sin() * first + (towards * angle).sin() * second) / sine.clamp_min(_LEAST)
    straight = (1 - towards) * first + towards * second
    return torch.nn.functional.normalize(torch.where(sine > _LEAST, arc, straight), dim=-1)


@dataclass(frozen=True)
class MergedLayersFormat(Format):
    """Every entry at `dtype`, in the layers `pairs` merged with its neighbour's.

    towards: where on the arc from the direction in the lower layer to that in the upper one their common direction is.
    retained: share of the prompt's tokens that both layers hold as they are, in each head those whose keys differ most.
    """

    dtype: torch.dtype
    pairs: tuple[tuple[int, int], ...]
    towards: float
    retained: float
    attends_itself: ClassVar[bool] = True
    needs_all: ClassVar[bool] = True

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{str(self.dtype).removeprefix('torch.')}, {2 * len(self.pairs)} layers in pairs",)

    def kind(self, shape: Shape) -> Hashable:
        return shape.layer

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        group = self.layers_with(shape.layer)
        if len(group) == 1:
            return DenseFormat(self.dtype).nbytes(shape, selected)
        own = shape.tokens * 2 * shape.itemsize + self.count(shape.tokens) * shape.entry_nbytes
        shared = shape.tokens * shape.entry_nbytes + self.count(shape.tokens) * INDEX_BYTES
        return shape.kv_heads * (own + (shared if shape.layer == group[0] else 0))

    def count(self, tokens: int) -> int:
        """How many of so many tokens are retained."""
        return math.ceil(self.retained * tokens)

    def layers_with(self, layer: int) -> tuple[int, ...]:
        return next((pair for pair in self.pairs if layer in pair), (layer,))

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        return DenseFormat(self.dtype).build(layer, tiers, None)

    def build_together(self, layers: Sequence[LayerTrace], tiers: Sequence[Tensor]) -> list[Store]:
        lower, upper = layers
        where = angle_between(lower.keys, upper.keys).argsort(dim=1, descending=True, stable=True)  # [k, n]
        where = where[:, : self.count(lower.tokens)].sort(dim=1).values
        pair = MergedPair(
            Rows.of(between(lower.keys, upper.keys, self.towards).to(self.dtype)),
            Rows.of(between(lower.values, upper.values, self.towards).to(self.dtype)),
            where.to(torch.int32),
            self.towards,
        )
        first, second = (MergedLayerStore.of(layer, pair, self.dtype) for layer in (lower, upper))
        first.other, second.other = second, first
        first.first = True
        return [first, second]


class MergedPair:
    """What two layers hold in common: directions of keys [t, d] and values [t, dv], and which tokens int32 [k, r] each
    has kept for itself.
    """

    def __init__(self, keys: Rows, values: Rows, where: Tensor, towards: float) -> None:
        self.keys, self.values, self.where, self.towards = keys, values, where, towards

    def clone(self) -> MergedPair:
        return MergedPair(self.keys.clone(), self.values.clone(), self.where.clone(), self.towards)


class MergedLayerStore(PartedStore):
    """One layer of a pair: its lengths of keys and values, its own of what is retained, and a tail. The key of what is
    retained has an infinite length where the others have theirs.

    New tokens are exact in both layers' tails while they attend; they are merged when the next ones come.
    """

    first = False  # whether it is the lower layer, which counts what both hold
    other: MergedLayerStore

    def __init__(
        self, pair: MergedPair, lengths: tuple[Rows, Rows], kept: tuple[Tensor, Tensor], tail: tuple[Rows, Rows]
    ) -> None:
        """lengths: of keys and of values, [t, 1]; kept [k, r, d] and [k, r, dv]; tail: keys and values."""
        self.pair, self.lengths, self.kept, self.tail = pair, lengths, kept, tail

    @classmethod
    def of(cls, layer: LayerTrace, pair: MergedPair, dtype: torch.dtype) -> MergedLayerStore:
        both, where = (layer.keys, layer.values), pair.where.long()[..., None]
        sizes = [x.float().norm(dim=-1, keepdim=True).to(dtype) for x in both]
        sizes[0].scatter_(1, where, torch.inf)
        lengths = tuple(Rows.of(x) for x in sizes)
        kept = tuple(x.gather(1, where.expand(-1, -1, x.shape[-1])).to(dtype) for x in both)
        keys, values = (Rows.of(x.new_empty(len(x), 0, x.shape[2], dtype=dtype)) for x in both)
        return cls(pair, (lengths[0], lengths[1]), (kept[0], kept[1]), (keys, values))

    @property
    def partner(self) -> Store:
        return self.other

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        if self.first:
            self._merge()
        for rows, new in zip(self.tail, (keys, values), strict=True):
            rows.append(new, block=1)

    def _merge(self) -> None:
        """Merge what has attended in both layers."""
        count = min(store.tail[0].longest for store in (self, self.other))
        if not count:
            return
        for side, common in enumerate((self.pair.keys, self.pair.values)):
            mine, others = (store.tail[side].cut_front(count) for store in (self, self.other))
            common.append(between(mine, others, self.pair.towards).to(common.data.dtype))
            for store, x in ((self, mine), (self.other, others)):
                store.lengths[side].append(x.float().norm(dim=-1, keepdim=True).to(x.dtype))

    # -- attention part by part: in captured steps tokens are merged in blocks

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.tail

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        more = self.tail[0].longest + steps if steps else 0
        common, others, *sizes = (
            pin(rows, rows.longest + more) for rows in (self.pair.keys, self.pair.values, *self.lengths)
        )

        def merged(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            return state(decode_dense(query, common, others, scoring, sizes=(sizes[0], sizes[1]), lse=True))

        retained = [whole_rows(*(Ragged.of(x) for x in self.kept))] if self.kept[0].shape[1] else []
        return [merged, *retained, whole_rows(keys, values)]

    @property
    def period(self) -> int:
        return _BLOCK

    @property
    def steps_until_settled(self) -> int:
        return max(_BLOCK - self.tail[0].longest, 1)

    def settle(self) -> None:
        """Merge what waits in both layers, when the lower one is told to."""
        if self.first:
            self._merge()

    def advance(self, positions: Tensor) -> None:
        for rows in self.tail:
            rows.grow(positions.numel())

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        joining = self.tail[0].longest + steps if steps else 0
        common = (self.pair.keys, self.pair.values) if self.first else ()
        return [(rows, min(steps, _BLOCK)) for rows in self.tail] + [
            (rows, joining) for rows in (*self.lengths, *common)
        ]

    def reserve(self, tokens: int) -> None:
        for rows in (*self.lengths, *((self.pair.keys, self.pair.values) if self.first else ())):
            rows.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.tail[0].heads

    @property
    def device(self) -> torch.device:
        return self.tail[0].data.device

    def slots(self) -> tuple[Tensor, Tensor | None]:
        count = self.lengths[0].longest + self.tail[0].longest
        return torch.arange(count, device=self.device)[None], None

    def contents(self, dtype: torch.dtype) -> Dequantised:
        where = self.pair.where.long()[..., None]
        sides = []
        for common, length, kept, new in zip(
            (self.pair.keys, self.pair.values),
            self.lengths,
            self.kept,
            self.tail,
            strict=True,
        ):
            merged = (common.view().float() * length.view().float()).to(dtype)
            merged = merged.scatter(1, where.expand(-1, -1, merged.shape[-1]), kept.to(dtype))
            sides.append(torch.cat([merged, new.view().to(dtype)], dim=1))
        return Dequantised(sides[0], sides[1], *self.slots())

    def tensors(self) -> dict[str, list[Tensor]]:
        shared = [*self.pair.keys.tensors(), *self.pair.values.tensors(), self.pair.where] if self.first else []
        own = [*(tensor for rows in (*self.lengths, *self.tail) for tensor in rows.tensors()), *self.kept]
        return {str(self.tail[0].data.dtype).removeprefix("torch."): [*shared, *own]}

    def clone(self) -> Self:
        """An independent copy, of the other layer too."""
        pair = self.pair.clone()
        mine, others = self.beside(pair), self.other.beside(pair)
        mine.other, others.other = others, mine
        return mine

    def beside(self, pair: MergedPair) -> Self:
        """A copy on what both hold in common, `pair`."""
        twin = copy(self)
        twin.pair, twin.tail = pair, (self.tail[0].clone(), self.tail[1].clone())
        twin.lengths = self.lengths[0].clone(), self.lengths[1].clone()
        twin.kept = self.kept[0].clone(), self.kept[1].clone()
        return twin
