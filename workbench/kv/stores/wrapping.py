"""A store around another one, which does what the other does unless it says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.stores.store import Dequantised, Store


class WrappingStore(Store):
    """Base of stores that hold nothing of their own but what is needed to attend to `inner`, or let go of it, in
    another way.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.inner.append(keys, values, positions)

    @property
    def holds_latents(self) -> bool:
        return self.inner.holds_latents

    def reserve(self, tokens: int) -> None:
        self.inner.reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.inner.kv_heads

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def entries(self) -> int:
        return self.inner.entries

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return self.inner.slots()

    def contents(self, dtype: torch.dtype) -> Dequantised:
        return self.inner.contents(dtype)

    def tensors(self) -> dict[str, list[Tensor]]:
        return self.inner.tensors()
