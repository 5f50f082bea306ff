"""A layer that keeps nothing of its own: it attends to what an earlier layer holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.store import Dequantised, Store
from workbench_kernels import Scoring


class SharedStore(Store):
    """What a layer has that reads another layer's keys and values (Gemma 3n): nothing but the way there.

    holder: that layer's store, which has taken in each token before this layer attends.
    """

    def __init__(self, holder: Store) -> None:
        self._holder = holder
        holder.keep_for_others()

    @property
    def holder(self) -> Store:
        return self._holder

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Nothing: the holder has them."""

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self._holder.attend(query, query_positions, scoring, weights=weights)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        return self._holder.contents(dtype)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {}

    @property
    def kv_heads(self) -> int:
        return self._holder.kv_heads

    @property
    def device(self) -> torch.device:
        return self._holder.device

    @property
    def entries(self) -> int:
        return self._holder.entries

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return self._holder.slots()

    @property
    def reach(self) -> int | None:
        return self._holder.reach

    def tiers(self, tokens: int) -> Tensor:
        return self._holder.tiers(tokens)

    def clone(self) -> Self:
        """One that reads the same holder; `cloned` copies holders too."""
        return type(self)(self._holder)


def cloned(stores: Iterable[Store]) -> list[Store]:
    """Independent copies of all layers' stores, which share among each other what the originals shared."""
    copies: dict[int, Store] = {}
    for store in stores:
        partner = None if store.partner is None else copies.get(id(store.partner))
        if store.holder is not store:
            copies[id(store)] = SharedStore(copies[id(store.holder)])
        elif partner is not None and partner.partner is not None:
            copies[id(store)] = partner.partner
        else:
            copies[id(store)] = store.clone()
    return list(copies.values())
