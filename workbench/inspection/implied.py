"""The weights that an attention method really makes, whatever way it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench import arguments
from workbench.attention.base import AttentionMethod, PassContext, within_a_chunk
from workbench.core.attention_rows import BLOCK_BYTES, RowBlock
from workbench.measure.attention import PooledMap, Pooling, Span, cell_edges, check_pooling, pool_blocks
from workbench.measure.head_classes import HeadStats
from workbench.measure.heads import HeadSums
from workbench.progress import Progress
from workbench.trace import LayerTrace

_STAGE = "attention as it was computed"
_ROWS = 128  # of a block of columns that are judged together: they stay in a CPU's caches


@dataclass(frozen=True)
class Implied:
    """What each query of a layer, or of one query head of it, adds up under an attention method.

    Every method's output is a sum of values, so values that are one in a single position and zero elsewhere give the
    weights of that position: the method runs once for each block of columns, in float32, on the queries and keys that
    were recorded of a KV head and the query heads that read it. Memory is that of a few blocks (64 MiB each) beside
    what the method itself needs. The time for all columns grows with the third power of the length: over 2,048 tokens
    0.4 s for three query heads of size 64, on one CPU core. Where columns are only summed up (pooling "mean" or "sum"),
    values that are one in all of a cell's positions give the whole cell, in the time of one reading.

    layers: how many the model has. A method that takes over what an earlier layer left has nothing to take here and
    computes for itself: see `workbench.inspection.captured.as_read`. below: the layers before this one, where the
    method chose in them what this one sees. Rows add up to what they do under the method, to 1 in most.
    """

    method: AttentionMethod
    layer: LayerTrace
    layers: int
    head: int | None = None
    below: tuple[LayerTrace, ...] = ()

    @property
    def tokens(self) -> int:
        return self.layer.tokens

    @cached_property
    def state(self) -> dict[Any, Any]:
        """What the method chose for the layer as it was recorded, all heads and the true values."""
        context = PassContext(self.layers, self.tokens)
        for layer in (*self.below, self.layer):
            context.layer = layer.index
            self.method.begin(layer, context)
        return context.state

    def maps(
        self,
        *,
        pixels: int = 512,
        pooling: Pooling = "max",
        rows: Span | None = None,
        cols: Span | None = None,
        progress: Progress | None = None,
    ) -> list[PooledMap]:
        """The map of each query head, pooled as `pooled_maps` does."""
        check_pooling(pixels, pooling)
        low, high = (0, self.tokens) if cols is None else arguments.span("cols", cols, self.tokens)
        if rows is not None:
            arguments.span("rows", rows, self.tokens)
        edges = torch.arange(low, high + 1) if pooling == "max" else cell_edges((low, high), pixels)
        maps = []
        for part in self._parts(progress):
            maps += part.pooled(edges, part.columns(edges), pixels=pixels, pooling=pooling, rows=rows, cols=(low, high))
        return maps

    def received(self, progress: Progress | None = None) -> Tensor:
        """What each position receives from all queries together: float32 [h, n], on the CPU."""
        each = torch.arange(self.tokens + 1)
        sums = [
            torch.cat([block.probs.sum(dim=1).cpu() for block in part.columns(each)], dim=1)
            for part in self._parts(progress)
        ]
        return torch.cat(sums)

    def judge(self, ids: Tensor, progress: Progress | None = None) -> HeadStats:
        """The statistics of the query heads; ids: the prompt's tokens [n]."""
        return self.survey(ids, pixels=1, progress=progress)[1]

    def survey(
        self, ids: Tensor, *, pixels: int, progress: Progress | None = None
    ) -> tuple[list[PooledMap], HeadStats]:
        """`maps` of the largest weights and what `judge` says, in one pass over the weights."""
        check_pooling(pixels, "max")
        edges, maps, stats = torch.arange(self.tokens + 1), [], []
        for part in self._parts(progress):
            sums = part.sums(ids)
            maps += part.pooled(edges, _judged(part.columns(edges), sums), pixels=pixels, pooling="max")
            stats.append(sums.stats())
        return maps, HeadStats.join(stats, torch.cat)

    def _parts(self, progress: Progress | None) -> Iterator[_Part]:
        """The wanted query heads by KV head; each part reports as one of several equal ones."""
        groups, progress = self.layer.groups, progress or Progress()
        wanted = range(self.layer.kv_heads) if self.head is None else [self.head // groups]
        own = slice(0, groups) if self.head is None else slice(self.head % groups, self.head % groups + 1)
        for index, kv in enumerate(wanted):
            yield _Part(self, kv, own, progress.part(index, len(wanted)))


@dataclass(frozen=True)
class _Part:
    """The query heads that read one KV head, of which those in `own` are wanted."""

    of: Implied
    kv: int
    own: slice
    progress: Progress

    def columns(self, edges: Tensor) -> Iterator[RowBlock]:
        """The weights of all queries, summed up between consecutive edges of positions: blocks [h, n, c] float32."""
        method, layer, groups = self.of.method, self.of.layer, self.of.layer.groups
        heads = slice(self.kv * groups, (self.kv + 1) * groups)
        query = layer.queries_held[heads].to(layer.device).float()
        key = layer.keys_held[self.kv : self.kv + 1].to(layer.device).float()
        tokens, number = layer.tokens, len(edges) - 1
        most = max(BLOCK_BYTES // (4 * groups * tokens), 1)
        for start in self.progress.track(range(0, number, most), _STAGE, -(-number // most)):
            stop = min(start + most, number)
            inside = edges[start : stop + 1].clamp(0, tokens)
            positions = torch.arange(int(inside[0]), int(inside[-1]))
            ones = torch.zeros(1, tokens, stop - start, device=layer.device)
            ones[0, positions, torch.bucketize(positions, inside, right=True) - 1] = 1
            context = PassContext(self.of.layers, tokens, layer.index, state=dict(self.of.state))
            scoring = within_a_chunk(method.key, layer.scoring, layer.tokens)
            out = method.attend(query, key, ones, scoring.of(heads), context)
            yield RowBlock(slice(0, tokens), slice(start, stop), out[self.own].float())

    def pooled(
        self, edges: Tensor, blocks: Iterator[RowBlock], *, rows: Span | None = None, **shown: Any
    ) -> list[PooledMap]:
        """The maps of columns that stand for the positions between `edges`."""

        def wanted(first: int, stop: int) -> Iterator[RowBlock]:
            for _, keys, weights in blocks:
                yield RowBlock(slice(0, stop - first), keys, weights[:, first:stop])

        heads = self.own.stop - self.own.start
        return pool_blocks(wanted, heads, torch.arange(self.of.tokens), edges[:-1], rows=rows, **shown)

    def sums(self, ids: Tensor) -> HeadSums:
        """What takes the statistics of these heads."""
        layer, at = self.of.layer, torch.arange(self.of.tokens)
        heads = self.own.stop - self.own.start
        return HeadSums(heads, 1, layer.device, at, at[None], ids.cpu(), layer.scoring, whole=False)


def _judged(blocks: Iterator[RowBlock], sums: HeadSums) -> Iterator[RowBlock]:
    """The blocks of columns, added to `sums` on their way."""
    for block in blocks:
        _, keys, weights = block
        for start in range(keys.start // _ROWS * _ROWS, weights.shape[1], _ROWS):
            rows = slice(start, min(start + _ROWS, weights.shape[1]))
            seen = slice(keys.start, min(keys.stop, rows.stop))  # what comes after them weighs nothing
            sums.add(rows, seen, weights[:, rows, : seen.stop - seen.start])
        yield block
