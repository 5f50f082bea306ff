"""What stores have in common that hold entries in the order in which they came, and their positions beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.rows import Rows
from workbench.kv.stores.store import Dequantised, Store, joined_slots
from workbench_kernels.rows import Ragged


class PositionedStore(Store):
    """Slots in one stretch or several, one behind the other; new tokens enter the last.

    A store that holds everything from position 0 on needs no positions; any other keeps them as int32, for each stretch
    in rows of their own.
    """

    def __init__(self, *positions: Rows | None) -> None:
        """positions: those of each stretch, or None for all of them."""
        self._positions = tuple(rows for rows in positions if rows is not None)

    @property
    @abstractmethod
    def _complete_length(self) -> int:
        """Slots of each head where everything from position 0 on is held."""

    @abstractmethod
    def rows_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [k, m, d] and values [k, m, dv] of all slots, dequantised."""

    @property
    def entries(self) -> int:
        if not self._positions:
            return self.kv_heads * self._complete_length
        return sum(rows.total for rows in self._positions)

    def slots(self) -> tuple[Tensor, Tensor | None]:
        if not self._positions:
            return torch.arange(self._complete_length, device=self.device)[None], None
        stretches = [(rows.view()[..., 0], rows.valid()) for rows in self._positions]
        return stretches[0] if len(stretches) == 1 else joined_slots(stretches, self.kv_heads, self.device)

    def stand_at(self, where: Tensor) -> None:
        if not self._positions:
            raise ValueError("a store that holds everything from position 0 on notes no positions")
        for rows in self._positions:
            rows.data = where.to(rows.data)[rows.data.long()]

    def contents(self, dtype: torch.dtype) -> Dequantised:
        return Dequantised(*self.rows_as(dtype), *self.slots())

    def _append_positions(self, positions: Tensor, block: int = 64) -> None:
        """The newest entries of every head stand at positions int [q], or each head's at its own [k, q]."""
        if self._positions:
            where = positions.to(self.device, torch.int32).expand(self.kv_heads, -1)
            self._positions[-1].append(where[..., None], block)

    def _grown(self, growing: Sequence[Rows], positions: Tensor) -> None:
        """Take up tokens at positions int [q] whose rows a step has written behind those of every head."""
        for rows in growing:
            rows.grow(positions.numel())
        self._append_positions(positions)

    @property
    def _ragged_positions(self) -> Ragged | None:
        """The positions of a single stretch as kernels take them; None where everything is held."""
        return self._positions[0].ragged() if self._positions else None

    @property
    def placed(self) -> tuple[Rows, ...]:
        """The rows of positions of each stretch; none where everything is held."""
        return self._positions

    def _position_tensors(self) -> list[Tensor]:
        return [tensor for rows in self._positions for tensor in rows.tensors()]

    def clone(self) -> Self:
        twin = copy(self)
        PositionedStore.__init__(twin, *(rows.clone() for rows in self._positions))
        return twin


def positions_in(keep: Tensor, older: Tensor, newer: Tensor) -> tuple[Rows, Rows] | None:
    """The same for a store of which keep [k, n] is in two stretches, older and newer [k, n]."""
    if bool(keep.all()):
        return None
    where = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape[0], -1)[..., None]
    return Rows.where(where, older, torch.int32), Rows.where(where, newer, torch.int32)


def positions_where(keep: Tensor) -> Rows | None:
    """The positions at which keep [k, n] is True, for a stretch of a store; None where that is everywhere."""
    if bool(keep.all()):
        return None
    where = torch.arange(keep.shape[1], device=keep.device).expand(keep.shape[0], -1)
    return Rows.where(where[..., None], keep, torch.int32)
