"""A store made of several: entries at different precisions, attended together."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Capturable, Part, Place
from workbench.kv.stores.parts import PartedStore
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, joined_slots
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged


class SplitStore(PartedStore):
    """Several stores over different positions of one layer; new tokens enter the first."""

    def __init__(self, parts: tuple[Store, ...]) -> None:
        self.parts = parts

    # -- attention part by part, where all of them can

    @property
    def capturable(self) -> Capturable | None:
        return self if all(part.parted for part in self.parts) and self.parts[0].capturable is not None else None

    @property
    def _first(self) -> Capturable:
        first = self.parts[0].capturable
        assert first is not None
        return first

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self._first.growing

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        first, *others = self.parts
        dtype = keys.data.dtype
        return [first.growing_part(keys, values, steps, pin), *(part.part(dtype, 0, pin) for part in others)]

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        return None if self.capturable is None else super().by_kernel(query, query_positions, scoring)

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        return self._first.room_for(steps)

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self._first.most_rows(steps)

    @property
    def period(self) -> int | None:
        return self._first.period

    @property
    def steps_until_settled(self) -> int | None:
        return self._first.steps_until_settled

    def settle(self) -> None:
        self._first.settle()

    def advance(self, positions: Tensor) -> None:
        self._first.advance(positions)

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
