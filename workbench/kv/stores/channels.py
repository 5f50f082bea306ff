"""An index of host memory by a few channels: those in which a query and the keys are largest stand for the product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kv.stores.format import Shape
from workbench.kv.stores.offload import Index, Retriever
from workbench.trace import LayerTrace

_BLOCK = 256  # entries for which room is made at once


@dataclass(frozen=True)
class ChannelIndex(Index):
    """Each channel's largest key on the device, and all keys channel by channel in host memory.

    fetch: entries that each query of a KV head gets. channels: how many of them approximate its scores.
    """

    dtype: torch.dtype
    fetch: int
    channels: int

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        return others.numel() * shape.key_width * self.dtype.itemsize

    def host_nbytes(self, shape: Shape, others: Tensor) -> int:
        longest = int(others.amax(dim=1).sum())
        return longest * shape.kv_heads * shape.key_width * self.dtype.itemsize

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        keys, others = layer.keys.to(self.dtype), others.cpu()
        lengths, there = others.sum(dim=1), keys.cpu()
        if bool((others == others[:1]).all()):
            columns = there[:, others[0]].transpose(1, 2).contiguous()
        else:
            columns = torch.zeros(keys.shape[0], keys.shape[2], int(lengths.max()), dtype=self.dtype)
            for head, away in enumerate(others):
                columns[head, :, : int(lengths[head])] = there[head, away].T
        return ChannelRetriever(keys.abs().amax(dim=1), columns, lengths.tolist(), self.fetch, self.channels)


class ChannelRetriever(Retriever):
    """peaks [k, d]: the largest magnitude of each channel of the keys, on the device. columns [k, d, room]: the keys in
    host memory, channel by channel, of which each head holds its length.
    """

    def __init__(self, peaks: Tensor, columns: Tensor, lengths: list[int], fetch: int, channels: int) -> None:
        self.peaks, self.columns, self.lengths = peaks, columns, lengths
        self.fetch, self.channels = fetch, min(channels, peaks.shape[1])

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        kv_heads, longest = len(self.lengths), max(self.lengths)
        mean = query.float().unflatten(0, (kv_heads, -1)).mean(dim=1)  # [k, q, d]
        dominant = (mean.abs() * self.peaks.float()[:, None]).topk(self.channels, dim=-1).indices  # [k, q, c]
        heads = torch.arange(kv_heads)[:, None, None]
        columns = self.columns[:, :, :longest][heads, dominant.cpu()].to(query.device)  # [k, q, c, m]
        scores = (mean.gather(2, dominant)[:, :, None] @ columns.float())[:, :, 0]  # [k, q, m]
        lengths = torch.tensor(self.lengths, device=query.device)
        scores = scores.masked_fill(torch.arange(longest, device=query.device) >= lengths[:, None, None], -torch.inf)
        best = scores.topk(min(self.fetch, longest), dim=-1)
        return best.indices, best.values > -torch.inf

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        count = keys.shape[1]
        self.peaks = torch.maximum(self.peaks, keys.to(self.peaks.dtype).abs().amax(dim=1))
        missing = max(self.lengths) + count - self.columns.shape[2]
        if missing > 0:
            self.columns = torch.nn.functional.pad(self.columns, (0, max(missing, _BLOCK)))
        new = keys.to("cpu", self.columns.dtype).transpose(1, 2)
        for head, length in enumerate(self.lengths):
            self.columns[head, :, length : length + count] = new[head]
        self.lengths = [length + count for length in self.lengths]

    def tensors(self) -> list[Tensor]:
        return [self.peaks]

    def host_tensors(self) -> list[Tensor]:
        return [self.columns]

    def clone(self) -> ChannelRetriever:
        parts = self.peaks.clone(), self.columns.clone(), list(self.lengths)
        return ChannelRetriever(*parts, self.fetch, self.channels)
