"""What attention looks like at any length: pooled maps, and sums over rows and columns, without the n x n matrix.

All functions take queries and keys after the rotary embedding, any dtype, compute in float32, and share the arguments
`scoring`, `query_positions`, `key_positions`, `block_bytes` and `progress` with
`workbench.core.attention_rows.row_blocks`, where they are explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import arguments
from workbench.core.attention_rows import (
    HeadGroup,
    RowBlock,
    check_scoring,
    head_groups,
    row_blocks,
    token_positions,
    visible_keys,
)
from workbench.errors import InputError
from workbench.formatting import Brief
from workbench.measure.whole_prompts import reads_whole
from workbench.progress import Progress
from workbench_kernels import Reading, Scoring, read_attention

Pooling = Literal["max", "mean", "sum"]
Span = tuple[int, int]

_KERNEL_PIXELS = 1024  # the largest maps that the kernel makes


@dataclass(frozen=True, eq=False, repr=False)
class PooledMap(Brief):
    """An attention map of one query head, pooled into cells.

    Cell (i, j) stands for the queries at positions row_edges[i] <= p < row_edges[i + 1] and the keys at positions
    col_edges[j] <= p < col_edges[j + 1]. A position whose key was evicted, or where no query was given, counts as zero,
    so the maps of a full and of a compressed cache lie exactly over each other.
    """

    values: Tensor
    """[rows, cols] float32, on the CPU"""
    row_edges: Tensor
    """[rows + 1] int64 positions"""
    col_edges: Tensor
    """[cols + 1] int64 positions"""
    pooling: Pooling

    def minus(self, other: PooledMap) -> PooledMap:
        """The difference of two maps, cell by cell: what this one has more than the other.

        The difference of maxima says how the strongest links changed, not how strong the largest change is: where a
        cell is one token each way, and for "mean" and "sum", the two are the same. Raises InputError for maps with
        other cells or another pooling.
        """
        same_cells(self, other)
        return replace(self, values=self.values - other.values)

    def to_frame(self) -> pd.DataFrame:
        """One row a cell: row_from, row_to, col_from, col_to (half-open ranges of positions), value."""
        rows, cols = self.values.shape
        edges = self.row_edges.numpy(), self.col_edges.numpy()
        return pd.DataFrame(
            {
                "row_from": edges[0][:-1].repeat(cols),
                "row_to": edges[0][1:].repeat(cols),
                "col_from": np.tile(edges[1][:-1], rows),
                "col_to": np.tile(edges[1][1:], rows),
                "value": self.values.flatten().numpy(),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: pooling, row_edges, col_edges, and values as a list of rows."""
        return {
            "pooling": self.pooling,
            "row_edges": self.row_edges.tolist(),
            "col_edges": self.col_edges.tolist(),
            "values": self.values.tolist(),
        }


class Cells(Protocol):
    """What lies on cells of positions."""

    @property
    def row_edges(self) -> Tensor: ...
    @property
    def col_edges(self) -> Tensor: ...
    @property
    def pooling(self) -> Pooling: ...


def same_cells(one: Cells, other: Cells) -> None:
    """Raise InputError unless two maps have the same cells and pooling."""
    if one.pooling != other.pooling:
        raise InputError(
            f"one map is pooled by {one.pooling}, the other by {other.pooling}: pool both the same way to subtract them"
        )
    for name in ("row_edges", "col_edges"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if not torch.equal(ours, theirs):
            raise InputError(
                f"the maps do not lie over each other: {name} are {_spanned(ours)} and {_spanned(theirs)}; make both "
                "of the same prompt, with the same pixels, rows and cols"
            )


def pooled_map(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    rows: Span | None = None,
    cols: Span | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> PooledMap:
    """The attention of one query head, pooled into at most `pixels` x `pixels` cells; exact where it fits.

    queries: [nq, d]; keys: [nk, d], those of the query head's KV head; key_positions: [nk].
    pooling: "max" shows single strong links at any zoom, "sum" adds up to the mass that moved, "mean" is the sum over
    the cell's area.
    rows, cols: half-open ranges of positions to zoom into; the softmax still runs over all visible keys. Default: all
    queries, and all positions up to the last one seen.

    Needs memory for the cells and for a few blocks of rows (8 MiB each on the CPU, else `block_bytes`).
    """
    if queries.ndim != 2 or keys.ndim != 2:
        raise InputError(
            f"a map shows one head: queries [nq, d], keys [nk, d], not {list(queries.shape)}, {list(keys.shape)}"
        )
    return pooled_maps(
        queries[None],
        keys[None],
        scoring,
        pixels=pixels,
        pooling=pooling,
        query_positions=query_positions,
        key_positions=key_positions,
        rows=rows,
        cols=cols,
        block_bytes=block_bytes,
        progress=progress,
    )[0]


def pooled_maps(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    pixels: int = 32,
    pooling: Pooling = "max",
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    rows: Span | None = None,
    cols: Span | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[PooledMap]:
    """The pooled maps of all query heads of a layer, on the same cells, in one pass.

    queries: [h, nq, d]; keys: [k, nk, d]; key_positions: [nk], or [k, nk] where KV heads hold different positions. The
    rest as in `pooled_map`.
    """
    check_pooling(pixels, pooling)
    nq, nk = queries.shape[1], keys.shape[1]
    if nq == 0 or nk == 0:
        raise InputError(f"a map needs at least one query and one key, not {nq} and {nk}")
    at, held = token_positions(nq, nk, query_positions, key_positions)  # [nq], [k or 1, nk]

    edges = _edges_of(at, held, pixels, rows, cols)
    if pixels <= _KERNEL_PIXELS and all(map(torch.equal, edges, _edges_of(at, held, pixels, None, None))):
        read = _read(queries, keys, at, held, scoring, sums=False, pooling=pooling, pixels=pixels)
        if read is not None and read.cells is not None:
            return [PooledMap(each, *edges, pooling) for each in read.cells.cpu()]
    maps = []
    for part in head_groups(queries, keys, held, progress):
        held_here = held if part.key_positions is None else part.key_positions.view(-1, nk)

        def blocks(first: int, stop: int, part: HeadGroup = part) -> Iterator[RowBlock]:
            return row_blocks(
                part.queries[:, first:stop],
                part.keys,
                scoring.of(part.heads),
                query_positions=at[first:stop],
                key_positions=part.key_positions,
                block_bytes=block_bytes,
                progress=part.progress,
            )

        values = _pool(blocks, len(part.queries), at, held_here, *edges, pooling, signed=False)
        maps += [PooledMap(each, *edges, pooling) for each in values]
    return maps


def pool_rows(
    blocks: Callable[[int, int], Iterable[RowBlock]],
    at: Tensor,
    held: Tensor,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
) -> PooledMap:
    """Pool rows of any attention map of one head into at most `pixels` x `pixels` cells.

    blocks: makes the rows of queries first .. stop - 1 as consecutive blocks, their `rows` counted from `first` and
    their `probs` [1, r, keys]. at: positions of the queries [nq]; held: of the keys [nk]; both ascending, on the CPU.
    pixels, pooling, rows, cols: as in `pooled_map`. Weights may be negative.
    """
    return pool_blocks(blocks, 1, at, held, pixels=pixels, pooling=pooling, rows=rows, cols=cols)[0]


def pool_blocks(
    blocks: Callable[[int, int], Iterable[RowBlock]],
    heads: int,
    at: Tensor,
    held: Tensor,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
) -> list[PooledMap]:
    """The same for several heads at once, whose blocks have `probs` [heads, r, keys]. Blocks may divide rows too."""
    check_pooling(pixels, pooling)
    edges = _edges_of(at, held[None], pixels, rows, cols)
    values = _pool(blocks, heads, at, held[None], *edges, pooling, signed=True)
    return [PooledMap(each, *edges, pooling) for each in values]


def _pool(
    blocks: Callable[[int, int], Iterable[RowBlock]],
    heads: int,
    at: Tensor,
    held: Tensor,
    row_edges: Tensor,
    col_edges: Tensor,
    pooling: Pooling,
    *,
    signed: bool,
) -> Tensor:
    """The cells of all heads, [h, rows, cols] on the CPU; at [nq], held [k or 1, nk]; signed: weights may be negative.

    On the way there is one column more, for keys outside of the edges.
    """
    height, width = len(row_edges) - 1, len(col_edges) - 1
    row_first, row_stop = _slots(at, row_edges)
    row_cell = (torch.bucketize(at, row_edges, right=True) - 1)[row_first:row_stop]
    col_cell = torch.bucketize(held, col_edges, right=True) - 1  # [k or 1, nk]
    inside = (col_cell >= 0) & (col_cell < width)
    col_cell = col_cell.masked_fill(~inside, width)
    shown = inside.any(dim=0).nonzero()[:, 0]  # slots; none where all of the span was evicted
    col_first, col_stop = (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, 0)
    # Weights that no block holds are zero: the least for a maximum, unless some of those that are there are negative.
    areas = row_edges.diff()[:, None] * col_edges.diff()
    counted = signed and pooling == "max"
    covered = torch.zeros(height, width + 1, dtype=torch.int64)
    lowest = -torch.inf if counted else 0.0
    values = torch.full((heads, height, width + 1), lowest)
    reduce = "amax" if pooling == "max" else "sum"

    for block in blocks(row_first, row_stop):
        if values.device != block.probs.device:
            values, col_cell = values.to(block.probs.device), col_cell.to(block.probs.device)
        low, high = max(block.keys.start, col_first), min(block.keys.stop, col_stop)
        if low >= high:
            continue
        probs = block.probs[..., low - block.keys.start : high - block.keys.start]  # [h, r, c]
        cells, heights = row_cell[block.rows].unique_consecutive(return_counts=True)
        # Rows first: that reduction runs along contiguous memory and leaves little for the scatter over columns.
        strips = _pool_rows(probs, heights.tolist(), pooling)  # [h, cells, c]
        into = col_cell[:, low:high]  # [k or 1, c]
        if counted:
            covered[cells] += heights[:, None] * into[0].cpu().bincount(minlength=width + 1)
        pooled = values.new_full((heads, len(cells), width + 1), lowest)
        into = into.repeat_interleave(heads // len(into), dim=0)[:, None].expand_as(strips)
        pooled.scatter_reduce_(2, into, strips, reduce, include_self=True)
        cells = cells.to(values.device)
        so_far = values[:, cells]  # a cell may have begun in the block before
        values[:, cells] = torch.maximum(so_far, pooled) if pooling == "max" else so_far + pooled

    values = values[..., :width].cpu()
    if counted:
        values = torch.where(covered[:, :width] < areas, values.clamp(min=0.0), values)
    elif pooling == "mean":
        values = values / areas
    return values.contiguous()


def column_sums(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """How much attention each key receives from all queries together: [h, nk] float32, each row summing to nq, to
    less where learned sinks get something.

    queries: [h, nq, d]; keys: [k, nk, d]. The accumulated attention of H2O (Zhang et al. 2023, arXiv:2306.14048).
    """
    read = _read(queries, keys, query_positions, key_positions, scoring)
    if read is not None and read.sums is not None:
        return read.sums
    received = torch.zeros(queries.shape[0], keys.shape[1], device=queries.device)
    for part in head_groups(queries, keys, key_positions, progress):
        for _, at, probs in row_blocks(
            part.queries,
            part.keys,
            scoring.of(part.heads),
            query_positions=query_positions,
            key_positions=part.key_positions,
            block_bytes=block_bytes,
            progress=part.progress,
        ):
            received[part.heads, at] += probs.sum(1)
    return received


def row_entropy(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """How spread out each query's attention is: entropy in nats, [h, nq] float32, from 0 (one key) to log(visible
    keys).

    queries: [h, nq, d]; keys: [k, nk, d].
    """
    read = _read(queries, keys, query_positions, key_positions, scoring, sums=False, entropy=True)
    if read is not None and read.entropy is not None:
        return read.entropy
    entropy = torch.zeros(queries.shape[:2], device=queries.device)
    for rows, _, probs in row_blocks(
        queries,
        keys,
        scoring,
        query_positions=query_positions,
        key_positions=key_positions,
        block_bytes=block_bytes,
        progress=progress,
    ):
        entropy[:, rows] = torch.special.entr(probs).sum(-1)
    return entropy


def sink_mass(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    first: int = 4,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The mean share of attention that goes to positions 0 .. first - 1: [h] float32, 0 to 1 (Xiao et al. 2023,
    arXiv:2309.17453).

    queries: [h, nq, d]; keys: [k, nk, d]. Only queries after those positions count, since the first ones have nothing
    else to look at; not a number where there is no such query.
    """
    arguments.whole("first", first, low=1)
    (h, nq, _), (k, nk, _) = queries.shape, keys.shape
    at, held = token_positions(nq, nk, query_positions, key_positions)
    is_sink = (held < first).to(queries.device, torch.float32)  # [k or 1, nk]
    begin = int(torch.searchsorted(at, first))
    mass = torch.zeros(h, device=queries.device)
    for _, seen, probs in row_blocks(
        queries[:, begin:],
        keys,
        scoring,
        query_positions=at[begin:],
        key_positions=held,
        block_bytes=block_bytes,
        progress=progress,
    ):
        sums = probs.sum(1).view(k, h // k, -1)  # [k, group, keys]
        mass += (sums * is_sink[:, None, seen]).sum(-1).flatten()
    return mass / (nq - begin)


def _read(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    scoring: Scoring,
    **wanted: Any,
) -> Reading | None:
    """What a kernel reads of a whole prompt's attention; None where rows are streamed instead.

    That is on a CPU, where keys were evicted or queries left out, and for what is wrong, which `row_blocks` says.
    """
    if not scoring.in_kernels or not reads_whole(queries, keys, query_positions, key_positions):
        return None
    check_scoring(scoring)
    queries, keys = queries.detach(), keys.detach()
    if scoring.sinks is None:
        return read_attention(queries, keys, scoring, **wanted)
    # The kernel knows no sinks: they are a part of each row's sum, and of nothing else.
    plain, sinks = scoring.without_sinks(), scoring.sinks.to(queries.device, torch.float32)
    lse = read_attention(queries, keys, plain, sums=False).lse
    return read_attention(queries, keys, plain, lse=torch.logaddexp(lse, sinks[:, None]), **wanted)


def queries_per_key(
    nq: int,
    nk: int,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """How many queries can see each key: int64 [k, nk] on the CPU, k being 1 where KV heads share positions.

    `column_sums / queries_per_key` is the mean attention that a key gets from those who could attend to it.
    """
    held = token_positions(nq, nk, query_positions, key_positions)[1]
    first, stop = visible_keys(nq, nk, query_positions, key_positions, window, kv_heads=held.shape[0], chunk=chunk)
    # Each query adds 1 from its first key on and takes it back after its last.
    steps = torch.zeros(held.shape[0], nk + 1, dtype=torch.int64)
    ones = torch.ones_like(first)
    return steps.scatter_add_(1, first, ones).scatter_add_(1, stop, -ones).cumsum(1)[:, :nk]


def check_pooling(pixels: int, pooling: Pooling) -> None:
    """Raise BadParameter unless maps can be pooled so."""
    arguments.whole("pixels", pixels, low=1)
    arguments.choice("pooling", pooling, get_args(Pooling))


def _edges_of(at: Tensor, held: Tensor, pixels: int, rows: Span | None, cols: Span | None) -> tuple[Tensor, Tensor]:
    """Edges of rows and columns for queries at [nq] and keys held [k or 1, nk], all of them by default."""
    end = max(int(held[:, -1].max()), int(at[-1])) + 1
    shown_rows = (int(at[0]), int(at[-1]) + 1) if rows is None else arguments.span("rows", rows, end)
    shown_cols = (0, end) if cols is None else arguments.span("cols", cols, end)
    return cell_edges(shown_rows, pixels), cell_edges(shown_cols, pixels)


def cell_edges(span: Span, pixels: int) -> Tensor:
    """The edges of at most `pixels` cells over a span of positions, [cells + 1]."""
    begin, end = span
    size = end - begin
    cells = min(pixels, size)
    return begin + torch.arange(cells + 1) * size // cells  # sizes differ by at most one


def _slots(positions: Tensor, edges: Tensor) -> Span:
    """The range of slots whose positions lie within the edges."""
    begin, end = torch.searchsorted(positions, edges[[0, -1]]).tolist()
    return begin, end


def _pool_rows(probs: Tensor, heights: list[int], pooling: Pooling) -> Tensor:
    """Reduce probs [h, r, c] over consecutive groups of rows of the given heights: [h, cells, c]."""
    if len(heights) == probs.shape[1]:  # one row a cell
        return probs
    groups = probs.split(heights, dim=1)
    return torch.stack([rows.amax(1) if pooling == "max" else rows.sum(1) for rows in groups], dim=1)


def _spanned(edges: Tensor) -> str:
    """Edges in words: where they begin and end, and how many cells that makes."""
    return f"{int(edges[0]):,} to {int(edges[-1]):,} in {len(edges) - 1} cells"
