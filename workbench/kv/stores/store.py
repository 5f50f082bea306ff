"""What every store can do: take new tokens, attend, and account for its bytes and positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from workbench.formatting import Brief
from workbench.kv.stores.capabilities import (
    Capturable,
    Droppable,
    Evictable,
    Part,
    Place,
    Replaceable,
    Rescored,
    Rewritable,
)
from workbench.measure.memory import HOST, tensor_bytes
from workbench_kernels import Scoring, attend
from workbench_kernels.dispatch import on_gpu
from workbench_kernels.rows import PackedRows, Ragged

_FEW_QUERIES = 64  # beyond, one matrix product over everything held is the faster way


@dataclass(frozen=True, repr=False)
class Dequantised(Brief):
    """Everything a store holds, dequantised, slot by slot.

    keys [k, m, d], values [k, m, dv]; positions int [k or 1, m]; valid bool [k, m] or None: heads with fewer slots are
    padded. Slots need not be in the order of positions.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor | None


class Store(ABC):
    """Where one layer's keys and values live during a run.

    Each store owns the true positions of what it holds: masks and rotary positions come from them, never from slot
    numbers.
    """

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add tokens: keys [k, q, d], values [k, q, dv], positions int [q], larger than any held. One that
        `holds_latents` takes rotated rows [1, q, w] for keys and latent ones [1, q, r] for values.
        """

    @property
    @abstractmethod
    def kv_heads(self) -> int:
        """How many KV heads the layer has."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it attends."""

    @abstractmethod
    def slots(self) -> tuple[Tensor, Tensor | None]:
        """The position in each slot, int [k or 1, m], and which slots are real, bool [k, m]; None: all."""

    @abstractmethod
    def contents(self, dtype: torch.dtype) -> Dequantised:
        """Everything held, as `dtype`."""

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """All live tensors by precision ("bfloat16", "4-bit"), indices, scales and bitmaps included."""

    @abstractmethod
    def clone(self) -> Self:
        """An independent copy."""

    def reserve(self, tokens: int) -> None:  # noqa: B027 (some stores need nothing)
        """Make room for `tokens` more, so that appending them moves nothing."""

    def stand_at(self, where: Tensor) -> None:
        """Let each entry said to stand at position i stand at where[i], int64 [n]; for stores that note positions."""
        raise NotImplementedError(f"{type(self).__name__} does not note the position of each entry")

    def rebuilt(self, build: Callable[[Store], Store]) -> Store:
        """The same with its entries in the store that `build` makes of one that only holds them."""
        return build(self)

    # Declarations of what some stores do that others do not; ask those of the `holder` where a layer may share.

    retrieves: ClassVar[bool] = False  # looks for what a query needs: how many scores it computes is its own affair
    moves_by_attention: ClassVar[bool] = False  # moves entries by the attention that they got
    selects: ClassVar[bool] = False  # of what it holds, a token that comes alone attends to a part

    @property
    def attends_itself(self) -> bool:
        """Whether no attention but the store's own will do."""
        return self.retrieves or self.moves_by_attention or self.selects

    @property
    def scores_computed(self) -> int | None:
        """How many scores the last pass took, over all query heads, by a store that selected; None: all there are."""
        return None

    @property
    def holds_latents(self) -> bool:
        """Whether it takes the rows of which a layer makes its keys and values in place of these (see `append`)."""
        return False

    @property
    def sliding_window(self) -> int | None:
        """The window that a sliding layer was read with, its own or a method's; None: all that is held is seen."""
        return None

    @property
    def newest_chunk(self) -> int | None:
        """How many positions make a chunk, for a store that keeps those of the newest one alone; None: it does not."""
        return None

    @property
    def evictable(self) -> Evictable | None:
        """The store as one from which single entries can leave while decoding; None where it has no state for that."""
        return None

    @property
    def droppable(self) -> Droppable | None:
        """The store as one from which single entries can leave; None where entries are stored together."""
        return None

    @property
    def rescored(self) -> Rescored | None:
        """The store as one that scores its entries anew when room is needed; None where it cannot."""
        return None

    @property
    def rewritable(self) -> Rewritable | None:
        """The store as one whose entries can be changed; None where they are rounded when they come."""
        return None

    @property
    def capturable(self) -> Capturable | None:
        """The store as one into which a captured decode step can write; None where others have to do more."""
        return None

    parted: ClassVar[bool] = False  # whether `part` and, where tokens may join, `growing_part` are there

    def part(self, dtype: torch.dtype, more: int, pin: Place) -> Part:
        """Attention of queries of this type over all that is held, wherever `pin` says it lies; so many entries of a
        head may join.
        """
        raise NotImplementedError(f"{type(self).__name__} is no part of another store that kernels attend to")

    def growing_part(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> Part:
        """The same while tokens join the rows keys and values, of a store that is `capturable`."""
        raise NotImplementedError(f"{type(self).__name__} is no part of another store that tokens join")

    @property
    def replaceable(self) -> Replaceable | None:
        """The store as one in which a captured step puts a new entry in the place of one that leaves; None where it
        cannot.
        """
        return None

    @property
    def in_place(self) -> tuple[Ragged | PackedRows, Ragged | PackedRows] | None:
        """Keys and values of every entry, where the newest token's attention over them is all that `attend` computes;
        who reads them so says `attended` afterwards. None where it does more.
        """
        return None

    def attended(self, library: CDLL | None = None) -> None:  # noqa: B027 (most change nothing by being read)
        """Know that tokens have attended to what is held; library: what was compiled for that, if they did by it."""

    @property
    def holder(self) -> Store:
        """The store that holds what this layer attends to: itself, or that of the layer whose keys it reads."""
        return self

    def reads(self, ids: Tensor, positions: Tensor) -> None:  # noqa: B027 (most go by keys and values alone)
        """Know the tokens, ids [q] at positions [q], that the next pass reads, before any of their keys come."""

    @property
    def partner(self) -> Store | None:
        """The store of another layer that holds something in common with this one, and is copied with it."""
        return None

    def keep_for_others(self) -> None:  # noqa: B027 (most hold all that they are asked for anyway)
        """Know that other layers attend to this store after its own has."""

    @property
    def reach(self) -> int | None:
        """The distance between a query and a key at which attention is computed at most; None: any that there is.

        Where all stores have one, positions beyond the model's own do no harm.
        """
        return None

    @property
    def nbytes_by_precision(self) -> dict[str, int]:
        """Live bytes by precision."""
        return {name: tensor_bytes(tensors) for name, tensors in self.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Live bytes of all tensors held on the device."""
        return sum(self.nbytes_by_precision.values())

    def host_tensors(self) -> dict[str, list[Tensor]]:
        """The same as `tensors` for what lies in host memory, from where it is fetched when it is needed."""
        return {}

    @property
    def host_nbytes_by_precision(self) -> dict[str, int]:
        """Live bytes in host memory, by precision."""
        return {name: tensor_bytes(tensors) for name, tensors in self.host_tensors().items()}

    @property
    def host_nbytes(self) -> int:
        """Live bytes in host memory."""
        return sum(self.host_nbytes_by_precision.values())

    def tiers(self, tokens: int) -> Tensor:
        """Where the first `tokens` positions lie, uint8 [k, n]: 0 nowhere, 1 on the device, 2 in host memory."""
        tiers = torch.zeros(self.kv_heads, tokens, dtype=torch.uint8, device=self.device)
        for row, positions in zip(tiers, self.positions, strict=True):
            row[positions[positions < tokens]] = 1
        return tiers

    @property
    def entries(self) -> int:
        """How many entries are held, over all KV heads."""
        positions, valid = self.slots()
        return self.kv_heads * positions.shape[1] if valid is None else int(valid.sum())

    @property
    def slot_positions(self) -> Tensor:
        """The position in each slot, int [k or 1, m]; see `slots` for which are real."""
        return self.slots()[0]

    @property
    def positions(self) -> list[Tensor]:
        """The true positions held by each KV head, ascending, int64 [m] each."""
        slots, valid = self.slots()
        rows = slots.expand(self.kv_heads, -1).long()
        if valid is None:
            return list(rows.sort(dim=-1).values)
        return [row[real].sort().values for row, real in zip(rows, valid, strict=True)]

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query [h, q, d] at query_positions [q] over everything held at or before each query's
        position.

        Returns the output [h, q, dv] and, if `weights`, the softmax rows [k, g, q, m] by slot.
        """
        if not weights:
            out = self.by_kernel(query, query_positions, scoring)
            if out is not None:
                return out, None
        dense = self.contents(query.dtype)
        visible = seen_by(query_positions, dense.positions, dense.valid, scoring)
        offsets = scoring.offsets(query_positions, dense.positions)
        return attend(query, dense.keys, dense.values, scoring, visible=visible, offsets=offsets, weights=weights)

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        """The output of `attend` by a kernel that reads what is held in place; None where there is none."""
        return None


def for_kernel(query: Tensor, rows: Tensor, query_positions: Tensor, scoring: Scoring) -> tuple[bool, Tensor | None]:
    """Whether decode kernels take this query [h, q, d] over what a store holds, and the positions that they mask by.

    They are for a few queries at 16 bits; the newest token alone sees everything, which needs no mask.
    """
    few = 0 < query.shape[1] <= _FEW_QUERIES
    if not (
        few and scoring.in_kernels and on_gpu(query, rows) and query.dtype.itemsize == 2 and query.dtype == rows.dtype
    ):
        return False, None
    alone = query.shape[1] == 1 and scoring.window is None
    return True, None if alone else query_positions.to(query.device)


def state(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """What a kernel gave that was asked for the log-sum-exp."""
    out, lse = found
    assert lse is not None
    return out, lse


def joined_valid(parts: Sequence[tuple[Tensor | None, int]], heads: int, device: torch.device) -> Tensor | None:
    """Which slots are real when several stretches of them, (valid [k, m] or None, m) each, stand one behind the other.

    bool [k, sum of m]; None if all are.
    """
    if all(valid is None for valid, _ in parts):
        return None
    whole = [
        torch.ones(heads, slots, dtype=torch.bool, device=device) if valid is None else valid.to(device)
        for valid, slots in parts
    ]
    return torch.cat(whole, dim=1)


def joined_slots(
    parts: Sequence[tuple[Tensor, Tensor | None]], heads: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Slots (see `Store.slots`) of several stretches that stand one behind the other: int [k, sum of m], and valid."""
    valid = joined_valid([(valid, positions.shape[1]) for positions, valid in parts], heads, device)
    return torch.cat([positions.to(device).expand(heads, -1) for positions, _ in parts], dim=1), valid


def seen_by(query_positions: Tensor, positions: Tensor, valid: Tensor | None, scoring: Scoring) -> Tensor | None:
    """Which slots each query may see, bool [k or 1, q, m]; None when all see all.

    query_positions int [q]; positions int [k or 1, m] and valid bool [k, m] or None as in Dequantised. Of what an
    indexer chose only what is held can be seen, which may be nothing.
    """
    real = None if valid is None else valid[:, None]
    if query_positions.numel() == 1 and scoring.window is None and scoring.chunk is None and scoring.chosen is None:
        return real  # the newest token sees everything held
    visible = scoring.visible(query_positions.to(positions.device), positions)
    return visible if real is None else visible & real


def kv_categories(stores: Iterable[Store]) -> dict[str, int]:
    """Live bytes of all layers as a timeline's categories: "kv bfloat16", "kv 4-bit", "host kv bfloat16"."""
    nbytes_of: Counter[str] = Counter()
    for store in stores:
        nbytes_of.update({f"kv {name}": nbytes for name, nbytes in store.nbytes_by_precision.items()})
        nbytes_of.update({f"{HOST}kv {name}": nbytes for name, nbytes in store.host_nbytes_by_precision.items()})
    return dict(nbytes_of)
