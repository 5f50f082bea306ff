"""Rows of several heads in one buffer, as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Head i owns data[starts[i] : starts[i] + lengths[i]].

    data [t, w], contiguous; starts and lengths int32 [k] on the same device; longest: no length is larger. Batch is
    simply more heads.
    """

    data: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of(cls, x: Tensor) -> Ragged:
        """All rows of x [k, n, w]."""
        heads, count, _ = x.shape
        starts = torch.arange(0, heads * count, count, dtype=torch.int32, device=x.device)
        lengths = torch.full((heads,), count, dtype=torch.int32, device=x.device)
        return cls(x.reshape(heads * count, -1).contiguous(), starts, lengths, count)

    def padded(self) -> tuple[Tensor, Tensor]:
        """The rows as [k, longest, w], heads that are shorter filled up with anything, and which are real [k, longest]."""
        steps = torch.arange(self.longest, device=self.data.device)
        real = steps < self.lengths[:, None]
        at = self.starts.long()[:, None] + torch.where(real, steps, 0)
        return self.data[at.clamp_max(max(self.data.shape[0] - 1, 0))], real
