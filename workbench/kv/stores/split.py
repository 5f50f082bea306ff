"""A store made of several: entries at different precisions, attended together."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.store import Dequantised, Store, joined_slots


class SplitStore(Store):
    """Several stores over different positions of one layer; new tokens enter the first."""

    def __init__(self, parts: tuple[Store, ...]) -> None:
        self.parts = parts

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.parts[0].append(keys, values, positions)

    def reserve(self, tokens: int) -> None:
        self.parts[0].reserve(tokens)

    @property
    def kv_heads(self) -> int:
        return self.parts[0].kv_heads

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def entries(self) -> int:
        return sum(part.entries for part in self.parts)

    def slots(self) -> tuple[Tensor, Tensor | None]:
        return joined_slots([part.slots() for part in self.parts], self.kv_heads, self.device)

    def contents(self, dtype: torch.dtype) -> Dequantised:
        parts = [part.contents(dtype) for part in self.parts]
        return Dequantised(
            torch.cat([part.keys for part in parts], dim=1),
            torch.cat([part.values for part in parts], dim=1),
            *joined_slots([(part.positions, part.valid) for part in parts], self.kv_heads, self.device),
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        merged: dict[str, list[Tensor]] = {}
        for part in self.parts:
            for name, tensors in part.tensors().items():
                merged.setdefault(name, []).extend(tensors)
        return merged

    def clone(self) -> Self:
        return type(self)(tuple(part.clone() for part in self.parts))
