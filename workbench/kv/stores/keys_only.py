"""Keys of a layer of which nothing else is needed."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.store import Dequantised, Store


class KeyStore(Store):
    """The keys [k, n, d] of one layer, without values, in room made for all of them at once."""

    def __init__(self, keys: Tensor, count: int = 0) -> None:
        self.keys, self.count = keys, count

    @property
    def appended(self) -> Tensor:
        """Those that are there, [k, m, d]."""
        return self.keys[:, : self.count]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return torch.arange(self.count, device=self.device)[None], None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        end = self.count + keys.shape[1]
        self.keys[:, self.count : end] = keys
        self.count = end

    def contents(self, dtype: torch.dtype) -> Dequantised:
        keys = self.appended.to(dtype)
        return Dequantised(keys, keys[..., :0], *self.slots())

    def tensors(self) -> dict[str, list[Tensor]]:
        return {str(self.keys.dtype).removeprefix("torch."): [self.keys]}

    def clone(self) -> Self:
        return type(self)(self.keys.clone(), self.count)
