"""A layer that keeps nothing of its own: it attends to what an earlier layer holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from torch import Tensor

from workbench.kv.stores.store import Store
from workbench.kv.stores.wrapping import WrappingStore
from workbench_kernels import Scoring


class SharedStore(WrappingStore):
    """What a layer has that reads another layer's keys and values (Gemma 3n): nothing but the way there.

    holder: that layer's store, which has taken in each token before this layer attends.
    """

    def __init__(self, holder: Store) -> None:
        super().__init__(holder)
        holder.keep_for_others()

    @property
    def holder(self) -> Store:
        return self.inner

    @property
    def holds_latents(self) -> bool:
        return False  # it takes nothing

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Nothing: the holder has them."""

    def reserve(self, tokens: int) -> None:
        """Nothing: the holder makes room for itself."""

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self.inner.attend(query, query_positions, scoring, weights=weights)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {}

    @property
    def reach(self) -> int | None:
        return self.inner.reach

    def tiers(self, tokens: int) -> Tensor:
        return self.inner.tiers(tokens)

    def clone(self) -> Self:
        """One that reads the same holder; `cloned` copies holders too."""
        return type(self)(self.inner)


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
