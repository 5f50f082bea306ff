"""A store made of several: entries at different precisions, attended together."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.store import Contents, Store, joined_valid


class SplitStore(Store):
    """Several stores over different positions of one layer; new tokens enter the first."""

    def __init__(self, parts: tuple[Store, ...]) -> None:
        self.parts = parts

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.parts[0].append(keys, values, positions)

    def reserve(self, tokens: int) -> None:
        self.parts[0].reserve(tokens)

    def contents(self, dtype: torch.dtype) -> Contents:
        held = [part.contents(dtype) for part in self.parts]
        heads = held[0].keys.shape[0]
        valid = joined_valid([(part.valid, part.keys.shape[1]) for part in held], heads, held[0].keys.device)
        return Contents(
            torch.cat([part.keys for part in held], dim=1),
            torch.cat([part.values for part in held], dim=1),
            torch.cat([part.positions.expand(heads, -1) for part in held], dim=1),
            valid,
        )

    def tensors(self) -> dict[str, list[Tensor]]:
        merged: dict[str, list[Tensor]] = {}
        for part in self.parts:
            for name, tensors in part.tensors().items():
                merged.setdefault(name, []).extend(tensors)
        return merged

    def clone(self) -> Self:
        return type(self)(tuple(part.clone() for part in self.parts))
