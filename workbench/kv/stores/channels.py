"""An index of host memory by a few channels: those in which a query and the keys are largest stand for the product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Pin
from workbench.kv.stores.format import INDEX_BYTES, Shape
from workbench.kv.stores.offload import Index, Retriever
from workbench.trace import LayerTrace
from workbench_kernels.fetching import fetch_rows

_BLOCK = 256  # entries for which room is made at once


@dataclass(frozen=True)
class ChannelIndex(Index):
    """Each channel's largest key and each head's length on the device, and all keys channel by channel in host memory.

    fetch: entries that each query of a KV head gets. channels: how many of them approximate its scores.
    """

    dtype: torch.dtype
    fetch: int
    channels: int

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        return others.numel() * (shape.key_width * self.dtype.itemsize + INDEX_BYTES)

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        longest = int(others.amax(dim=1).sum())
        return longest * shape.kv_heads * shape.key_width * self.dtype.itemsize

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        keys = layer.keys.to(self.dtype)
        others = others.to(keys.device)
        lengths = others.sum(dim=1, dtype=torch.int32)
        longest = int(lengths.max())
        # Each head's own entries in front, in their order; what is beyond them is never looked at.
        slots = others.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]  # [k, m]
        columns = keys.gather(1, slots[..., None].expand(-1, -1, keys.shape[2])).transpose(1, 2)
        columns = columns.masked_fill(torch.arange(longest, device=keys.device) >= lengths[:, None, None], 0)
        return ChannelRetriever(keys.abs().amax(dim=1), _in_host_memory(columns), lengths, self.fetch, self.channels)


class ChannelRetriever(Retriever):
    """peaks [k, d]: the largest magnitude of each channel of the keys, on the device. columns [k, d, room]: the keys in
    host memory, channel by channel, of which each head holds its length.
    """

    capturable = True

    def __init__(self, peaks: Tensor, columns: Tensor, lengths: Tensor, fetch: int, channels: int) -> None:
        """lengths int32 [k], on the device."""
        self.peaks, self.columns, self.lengths = peaks, columns, lengths
        self.longest = int(lengths.max())
        self.fetch, self.channels = fetch, min(channels, peaks.shape[1])

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self._found(query, min(self.fetch, self.longest))

    def _found(self, query: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        kv_heads, width, room = self.columns.shape
        mean = query.float().unflatten(0, (kv_heads, -1)).mean(dim=1)  # [k, q, d]
        dominant = (mean.abs() * self.peaks.float()[:, None]).topk(self.channels, dim=-1).indices  # [k, q, c]
        heads = torch.arange(kv_heads, device=query.device)[:, None, None]
        columns = fetch_rows(self.columns.view(-1, room), heads * width + dominant)  # [k, q, c, room]
        scores = (mean.gather(2, dominant)[:, :, None] @ columns.float())[:, :, 0]  # [k, q, room]
        beyond = torch.arange(room, device=query.device) >= self.lengths[:, None, None]
        best = scores.masked_fill_(beyond, -torch.inf).topk(wanted, dim=-1)
        return best.indices, best.values > -torch.inf

    def captured(self, steps: int, pin: Pin) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
        self._reserve(steps)
        wanted = min(self.fetch, self.columns.shape[2])
        return lambda query, _scale: self._found(query, wanted)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        count = keys.shape[1]
        self.peaks.copy_(torch.maximum(self.peaks, keys.to(self.peaks.dtype).abs().amax(dim=1)))
        self._reserve(count)
        new = keys.to("cpu", self.columns.dtype).transpose(1, 2)
        for head, length in enumerate(self.lengths.tolist()):
            self.columns[head, :, length : length + count] = new[head]
        self.lengths += count
        self.longest += count

    def _reserve(self, count: int) -> None:
        """Make room for `count` more entries of each head."""
        missing = self.longest + count - self.columns.shape[2]
        if missing > 0:
            there = self.columns.to(self.peaks.device)  # a GPU moves faster
            self.columns = _in_host_memory(torch.nn.functional.pad(there, (0, max(missing, _BLOCK))))

    def tensors(self) -> list[Tensor]:
        return [self.peaks, self.lengths]

    def host_tensors(self) -> list[Tensor]:
        return [self.columns]

    def clone(self) -> ChannelRetriever:
        columns = torch.empty(self.columns.shape, dtype=self.columns.dtype, pin_memory=self.columns.is_pinned())
        parts = self.peaks.clone(), columns.copy_(self.columns), self.lengths.clone()
        return ChannelRetriever(*parts, self.fetch, self.channels)


def _in_host_memory(x: Tensor) -> Tensor:
    """x there, contiguous; pinned where it comes from a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda and x.numel() > 0).copy_(x)
