"""How a layer turns its queries and keys by their positions, as a value that can be applied and undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from workbench_kernels.rotary import rotate

T = TypeVar("T")
Table = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions [p] to (cos, sin), each [p, r]: the angles of r / 2 pairs of channels, twice."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A layer's rotary embedding: a table of angles, and which channels of a head they turn.

    table: from positions [p] to (cos, sin), each [p, r] with r <= d, for channels in the order of halves, as in Llama:
    channel i < r / 2 is paired with i + r / 2, and those from r on are not turned. r is 0 where the layer turns
    nothing. Attention scaling (YaRN, LongRoPE) is part of it. order: the channels of the model's own heads in that
    order; None: they lie so already.
    """

    table: Table
    order: tuple[int, ...] | None = None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) at positions of any shape [...], each [..., r] float32, for channels in the order of halves."""
        cos, sin = self.table(positions.reshape(-1))
        return cos.float().unflatten(0, positions.shape), sin.float().unflatten(0, positions.shape)

    @cached_property
    def width(self) -> int:
        """How many channels are turned."""
        return self.table(torch.zeros(1, dtype=torch.long))[0].shape[-1]

    def halved(self, x: Tensor) -> Tensor:
        """The channels of x [..., d] in the order of halves; x itself where they lie so."""
        return x if self.order is None else x[..., self._index(x)]

    def unhalved(self, x: Tensor) -> Tensor:
        """Undo `halved`."""
        return x if self.order is None else torch.empty_like(x).index_copy_(-1, self._index(x), x)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., n, d] turned to positions [n], [1, n] or [..., n]."""
        return self.by(x, *self(positions))

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., n, d] float32, which has been turned to its positions, as it was before."""
        cos, sin = self(positions)
        size = cos.square() + sin.square()  # 1, or what YaRN and LongRoPE scale by
        return self.by(x, cos / size, -sin / size)

    def turned_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """As `undo`, in float32, but for the factor of YaRN and LongRoPE, which stays."""
        cos, sin = self(positions)
        size = (cos.square() + sin.square()).sqrt()
        return self.by(x.float(), cos / size, -sin / size)

    def by(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., n, d] rotated by another table: [n, r], or [1, r] for all, such as a mean over positions."""
        # The table is made where the model keeps it, which need not be where the layer lies.
        return self.unhalved(rotate(self.halved(x), cos.to(x.device), sin.to(x.device)))

    def latest(self, what: str, key: object, compute: Callable[[], T]) -> T:
        """`compute()`, a table made of this one, remembered as `what` until it is asked for under another key."""
        known = self._tables.get(what)
        if known is None or known[0] != key:
            known = self._tables[what] = (key, compute())
        table: T = known[1]
        return table

    @cached_property
    def _tables(self) -> dict[str, tuple[object, Any]]:
        return {}

    def _index(self, x: Tensor) -> Tensor:
        if x.device not in self._indices:
            self._indices[x.device] = torch.tensor(self.order, device=x.device)
        return self._indices[x.device]

    @cached_property
    def _indices(self) -> dict[torch.device, Tensor]:
        return {}  # `order` on each device that asked: it is needed at every step
