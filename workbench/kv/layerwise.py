"""Methods that hold each layer at a level of its own: what a search over levels needs to know of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from workbench.kv.method import KVMethod, Study
from workbench.kv.stores.format import Shape


class LayerwiseMethod(KVMethod):
    """Base of methods that choose among levels for each layer that may be compressed, fewest bytes first."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """How many levels a layer may have."""

    @abstractmethod
    def losses(self, study: Study, dtype: torch.dtype) -> Tensor:
        """What each layer alone loses at each level, float64 [l, v]."""

    @abstractmethod
    def sizes(self, dtype: torch.dtype, shapes: Sequence[Shape]) -> Tensor:
        """Bytes of each layer at each level, every token kept: int64 [l, v], ascending."""

    @abstractmethod
    def at_levels(self, levels: Sequence[int]) -> Self:
        """The method with a level for each layer, and nothing left to choose."""
