"""What a layer of latent attention (MLA) holds: a row a token, of which all its heads make their keys and values."""

from __future__ import annotations

from collections.abc import Hashable
from ctypes import CDLL
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.engine.latents import Expansion
from workbench.kv.stores.capabilities import Droppable, Evictable
from workbench.kv.stores.format import Format, Shape
from workbench.kv.stores.store import Dequantised, Store, seen_by
from workbench.kv.stores.wrapping import WrappingStore
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, attend


class LatentStore(WrappingStore):
    """Latent and rotated rows in another store, each once for all heads: r + w numbers a token where it is exact.

    inner: its one head's keys are the rotated rows [1, m, w], its values the latent ones [1, m, r]. Attention is
    absorbed (DeepSeek-V2, arXiv:2405.04434, section 2.1.2): queries go through the map that makes keys, and what comes
    out through the one that makes values, so nothing is expanded but the maps, where they are no weight's. All rows
    are, while they are fewer than the maps have, or where keys are no linear map of them. To others it has the keys
    and values of all `heads`, and so it is shown.
    """

    def __init__(self, inner: Store, expansion: Expansion, heads: int) -> None:
        super().__init__(inner)
        self.expansion, self.heads = expansion, heads

    @property
    def holds_latents(self) -> bool:
        return True

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def entries(self) -> int:
        return self.heads * self.inner.entries

    def slots(self) -> tuple[Tensor, Tensor | None]:
        positions, valid = self.inner.slots()
        return positions, None if valid is None else valid.expand(self.heads, -1)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        """The keys and values of all heads."""
        rows = self.inner.contents(dtype)
        keys, values = self.expansion(rows.values, rows.keys)
        return Dequantised(
            keys, values, rows.positions, None if rows.valid is None else rows.valid.expand(len(keys), -1)
        )

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As any store does; the softmax rows are those of one KV head that all query heads share, [1, h, q, m]."""
        rows = self.inner.contents(query.dtype)
        visible = seen_by(query_positions, rows.positions, rows.valid, scoring)
        offsets = scoring.offsets(query_positions, rows.positions)
        both = torch.cat([rows.values, rows.keys], dim=-1)  # [1, m, r + w]
        if both.shape[1] < both.shape[2] or not self.expansion.linear:
            given: tuple[Tensor, Tensor, Tensor] = query, *self.expansion(rows.values, rows.keys)
            to_values = None
        else:
            to_keys, to_values = (x.to(query.dtype) for x in self.expansion.maps(rows.values, rows.keys))
            given = query @ to_keys.transpose(1, 2), both, rows.values  # [h, q, r + w]
        out, by_slot = attend(*given, scoring, visible=visible, offsets=offsets, weights=weights)
        self.inner.attended()
        if by_slot is not None:
            by_slot = by_slot.view(1, -1, *by_slot.shape[2:])
        return (out if to_values is None else out @ to_values), by_slot

    def tensors(self) -> dict[str, list[Tensor]]:
        return {f"latent {name}": tensors for name, tensors in self.inner.tensors().items()}

    def clone(self) -> Self:
        return type(self)(self.inner.clone(), self.expansion, self.heads)

    # -- what the inner store declares

    @property
    def sliding_window(self) -> int | None:
        return self.inner.sliding_window

    @property
    def reach(self) -> int | None:
        return self.inner.reach

    @property
    def evictable(self) -> Evictable | None:
        return self.inner.evictable

    @property
    def droppable(self) -> Droppable | None:
        return self.inner.droppable

    def attended(self, library: CDLL | None = None) -> None:
        self.inner.attended(library)

    def keep_for_others(self) -> None:
        self.inner.keep_for_others()


@dataclass(frozen=True)
class LatentFormat(Format):
    """Latent and rotated rows in another format, as its only head's; shapes are those of the rows."""

    inner: Format

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.tiers

    def kind(self, shape: Shape) -> Hashable:
        return self.inner.kind(shape)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.inner.exact

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        return self.inner.nbytes(shape, selected)

    def beside(self, shape: Shape) -> int:
        return self.inner.beside(shape)

    def of_everything(self) -> Format:
        return LatentFormat(self.inner.of_everything())

    def droppable(self) -> Format | None:
        inner = self.inner.droppable()
        return None if inner is None else LatentFormat(inner)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        """state [1, n] or [1, n, w]: of the entries that all heads share."""
        assert layer.latents is not None
        return LatentStore(self.inner.build(layer.rows, tiers[:1], state), layer.latents.expansion, layer.heads)
