"""A part of the cache on the device, the rest in host memory: what all stores of that kind have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import DenseFormat
from workbench.kv.stores.host import HostRows
from workbench.kv.stores.store import Dequantised, Store, joined_slots


class TieredStore(Store):
    """Entries on the device (`near`), where new tokens enter, and entries in host memory (`far`), with an index."""

    retrieves = True
    near: DenseStore
    far: HostRows

    @abstractmethod
    def index(self) -> list[Tensor]:
        """What is held on the device of the entries in host memory."""

    def host_index(self) -> list[Tensor]:
        """What is held of them in host memory besides the entries."""
        return []

    @property
    def kv_heads(self) -> int:
        return self.near.kv_heads

    @property
    def device(self) -> torch.device:
        return self.near.device

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return joined_slots([self.near.slots(), self.far.slots()], self.kv_heads, self.device)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        near, device = self.near.contents(dtype), self.device
        keys, values = self.far.whole()
        return Dequantised(
            torch.cat([near.keys, keys.to(device, dtype)], dim=1),
            torch.cat([near.values, values.to(device, dtype)], dim=1),
            *self.slots(),
        )

    def tiers(self, tokens: int) -> Tensor:
        present = super().tiers(tokens)
        return torch.where((present > 0) & (self.near.tiers(tokens) == 0), 2, present)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {**self.near.tensors(), "index": self.index()}

    def host_tensors(self) -> dict[str, list[Tensor]]:
        name = str(self.far.keys.data.dtype).removeprefix("torch.")
        return {name: self.far.tensors(), "index": self.host_index()}


@dataclass(frozen=True)
class TieredFormat(DenseFormat):
    """Entries at `dtype`, on the device or in host memory, as a method that reads by itself left them."""

    attends_itself: ClassVar[bool] = True

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*super().tiers, "host")
