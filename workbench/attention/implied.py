"""The map that an attention method really makes, whatever way it computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workbench.attention.base import AttentionMethod, Pass
from workbench.measure.attention import PooledMap, Pooling, Span, pool_rows
from workbench.measure.rows import BLOCK_BYTES, RowBlock
from workbench.progress import Progress
from workbench.trace import LayerTrace


def implied_map(
    method: AttentionMethod,
    layer: LayerTrace,
    head: int,
    layers: int,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
    progress: Progress | None = None,
) -> PooledMap:
    """What each query of a head adds up under `method`, pooled as `pooled_map` does.

    Every method's output is a sum of values, so values that are one in a single position and zero elsewhere give the
    weights of that position: the method runs once for each block of columns, on the queries and keys recorded of the
    head and those that share its KV head. layers: how many the model has. A method that takes over what an earlier
    layer left has nothing to take here, and computes for itself.
    """
    kv = head // layer.groups
    own = slice(kv * layer.groups, (kv + 1) * layer.groups)
    query, key = layer.queries[own], layer.keys[kv : kv + 1]
    tokens = layer.tokens
    most = max(BLOCK_BYTES // (4 * layer.groups * tokens), 1)
    low, high = cols or (0, tokens)
    progress = progress or Progress()

    def blocks(first: int, stop: int) -> Iterator[RowBlock]:
        starts = range(max(low, 0), min(high, tokens), most)
        for start in progress.track(starts, "attention as it was computed", len(starts)):
            columns = torch.arange(start, min(start + most, high, tokens), device=query.device)
            ones = torch.zeros(1, tokens, len(columns), dtype=query.dtype, device=query.device)
            ones[0, columns, torch.arange(len(columns), device=query.device)] = 1
            at = Pass(layers, tokens, layer.index)
            out = method.attend(query, key, ones, scale=layer.scale, window=layer.window, softcap=layer.softcap, at=at)
            weights = out[head - own.start, first:stop].float()[None]  # [1, r, c]
            yield RowBlock(slice(0, stop - first), slice(start, start + len(columns)), weights)

    places = torch.arange(tokens)
    return pool_rows(blocks, places, places, pixels=pixels, pooling=pooling, rows=rows, cols=(low, high))
