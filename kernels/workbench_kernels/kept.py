"""Which tokens the heads of a cache keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Which of n tokens each of k heads keeps."""

    places: Tensor
    """int32 [t], ascending within each head, head after head"""
    starts: Tensor
    """int32 [k]: where in `places` each head's begin"""
    begins: Tensor
    """int32 [k]: the row that each head's first becomes, when they are laid one head after another"""
    lengths: Tensor
    """int32 [k]"""
    counts: Tensor
    """int64 [k] in host memory: the lengths again, so that sizes are known without waiting for the device"""
    tokens: int
    """n"""

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def longest(self) -> int:
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def complete(self) -> bool:
        """Whether every head keeps every token."""
        return self.total == self.counts.numel() * self.tokens

    def first(self, counts: Tensor) -> Kept:
        """Each head's first `counts` [k] (in host memory) of these, or all where it has fewer."""
        return self._part(torch.zeros_like(self.counts), torch.minimum(counts, self.counts))

    def after(self, counts: Tensor) -> Kept:
        """These without each head's first `counts` [k] (in host memory)."""
        skipped = torch.minimum(counts, self.counts)
        return self._part(skipped, self.counts - skipped)

    def _part(self, skipped: Tensor, counts: Tensor) -> Kept:
        both = torch.stack([skipped, counts.cumsum(0) - counts, counts]).to(self.places.device, torch.int32)
        return Kept(self.places, self.starts + both[0], both[1], both[2], counts, self.tokens)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Head and token of every row, int64 [t] each."""
        device = self.places.device
        counts = self.counts.to(device)
        heads = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts, output_size=self.total)
        if self.places.numel() == self.total:
            return heads, self.places.long()
        steps = torch.arange(self.total, device=device) - self.begins.long()[heads]
        return heads, self.places[self.starts.long()[heads] + steps].long()
