"""What a layer's attention looks like as a whole, read beside it: the n x n matrix never exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu
from workbench_kernels.scoring import Scoring

Pooling = Literal["max", "mean", "sum"]

_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size


class Reading(NamedTuple):
    """What was read of one layer's attention; None for what was not asked for. All float32."""

    lse: Tensor
    """[h, n] natural logarithm of each row's sum of exp(score) over the keys it sees"""
    sums: Tensor | None
    """[h, m] the attention that each key receives from all rows together"""
    most: Tensor | None
    """[h, m] the most attention that any row pays to each key"""
    entropy: Tensor | None
    """[h, n] -sum P log P of each row, in nats"""
    cells: Tensor | None
    """[h, min(pixels, n), min(pixels, m)] the pooled map"""


def read_attention(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    *,
    lse: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    sums: bool = True,
    most: bool = False,
    entropy: bool = False,
    pooling: Pooling | None = None,
    pixels: int = 512,
) -> Reading:
    """Column sums, column maxima, row entropies and pooled maps of all heads' causal attention, in one pass over Q K^T.

    query [h, n, d] and key [k, m, d] after the rotary embedding, h a multiple of k, n <= m: the queries are those of
    the last n keys. scoring: as the layer attends; a row sees `window` keys, its own included.
    lse: each row's log-sum-exp [h, n] float32, which flash attention leaves; found here if it is not given, which
    takes a pass of its own. So does the entropy, on a GPU, where lse was given; where not, both are one pass.
    rows: of which rows `sums` and `most` are, half-open (default: all; not together with a map).
    pooling: how weights become the cells of a map of at most `pixels` x `pixels` (<= 1024), None: no map. Cell i of c
    begins at position i * n // c. "mean" counts the keys that a row does not see as zero.

    Deterministic on any device. Memory: the results; on a GPU 16 MiB more where several blocks of columns share a cell
    of the map; in plain PyTorch a few blocks of rows.
    Raises ValueError for what does not fit together.
    """
    compute: Callable[..., Reading] = read_attention_reference
    if on_gpu(query, key, lse):
        from workbench_kernels.gpu import reading as gpu

        compute = gpu.read_attention
    return compute(
        query,
        key,
        scoring,
        lse=lse,
        rows=rows,
        sums=sums,
        most=most,
        entropy=entropy,
        pooling=pooling,
        pixels=pixels,
    )


def read_attention_reference(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    *,
    lse: Tensor | None = None,
    rows: tuple[int, int] | None = None,
    sums: bool = True,
    most: bool = False,
    entropy: bool = False,
    pooling: Pooling | None = None,
    pixels: int = 512,
) -> Reading:
    """The same in plain PyTorch, in float32, float64 inputs in float64: blocks of rows, O(block * m) memory."""
    first, last = check_reading(query, key, scoring, lse, rows, pooling, pixels)
    (h, n, _), m = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    found = torch.empty(h, n, dtype=wide, device=device) if lse is None else lse
    received = torch.zeros(h, m, dtype=wide, device=device) if sums else None
    largest = torch.zeros(h, m, dtype=wide, device=device) if most else None
    spread = torch.empty(h, n, dtype=wide, device=device) if entropy else None
    cells = None
    if pooling is not None:
        tops, lefts = cell_edges(n, pixels, device), cell_edges(m, pixels, device)
        cells = torch.zeros(h, len(tops) - 1, len(lefts) - 1, dtype=wide, device=device)
        row_cell = torch.bucketize(torch.arange(n, device=device), tops, right=True) - 1
        col_cell = torch.bucketize(torch.arange(m, device=device), lefts, right=True) - 1
        how = "amax" if pooling == "max" else "sum"
    for block, scores in _score_blocks(query, key, scoring, wide):
        if lse is None:
            found[:, block] = scores.logsumexp(-1)
        logs = scores - found[:, block, None]
        probs = logs.exp()  # [h, r, m]
        begin, end = max(first - block.start, 0), max(last - block.start, 0)
        if received is not None:
            received += probs[:, begin:end].sum(1)
        if largest is not None and probs[:, begin:end].shape[1]:
            largest = torch.maximum(largest, probs[:, begin:end].amax(1))
        if spread is not None:
            spread[:, block] = -(probs * logs.masked_fill_(probs == 0, 0)).sum(-1)
        if cells is not None:
            strips = probs.new_zeros(*probs.shape[:2], cells.shape[2])
            strips.scatter_reduce_(2, col_cell.expand_as(probs), probs, how)
            into = row_cell[block, None].expand_as(strips)
            cells.scatter_reduce_(1, into, strips, how)
    if cells is not None and pooling == "mean":
        cells /= tops.diff()[:, None] * lefts.diff()
    return Reading(found, received, largest, spread, cells)


def _score_blocks(query: Tensor, key: Tensor, scoring: Scoring, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Scores [h, r, m] of consecutive blocks of rows, minus infinity where a row does not look."""
    (h, n, _), (k, m, _) = query.shape, key.shape
    keys = key.to(dtype).transpose(1, 2)
    cols = torch.arange(m, device=query.device)
    step = max(1, _ROWS_BYTES // (4 * h * m))
    for start in range(0, n, step):
        block = slice(start, min(n, start + step))
        part = query[:, block].to(dtype).reshape(k, -1, query.shape[2])
        products = torch.matmul(part, keys).view(h, -1, m)
        rows = torch.arange(m - n + block.start, m - n + block.stop, device=query.device)
        yield block, scoring.scores(products, scoring.visible(rows, cols))


def cell_edges(size: int, pixels: int, device: torch.device) -> Tensor:
    """Where the cells of at most `pixels` begin, and the last one ends: int64 [cells + 1]."""
    cells = min(pixels, size)
    return torch.arange(cells + 1, device=device) * size // cells


def check_reading(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    lse: Tensor | None,
    rows: tuple[int, int] | None,
    pooling: Pooling | None,
    pixels: int,
) -> tuple[int, int]:
    """Raise ValueError for arguments of `read_attention` that do not fit together; the range of rows that count."""
    if query.ndim != 3 or key.ndim != 3 or query.shape[2] != key.shape[2] or query.dtype != key.dtype:
        raise ValueError(
            f"query must be [h, n, d] and key [k, m, d] of one dtype, not {list(query.shape)} ({query.dtype}) and "
            f"{list(key.shape)} ({key.dtype})"
        )
    (h, n, _), (k, m, _) = query.shape, key.shape
    if k == 0 or h == 0 or h % k:
        raise ValueError(f"{h} query heads cannot share {k} KV heads: the first must be a multiple of the second")
    if not 0 < n <= m:
        raise ValueError(f"{n} queries for {m} keys: they must be those of the last keys, and at least one")
    if lse is not None and (lse.shape != (h, n) or not lse.is_floating_point()):
        raise ValueError(f"lse must be [{h}, {n}] floating-point, not {list(lse.shape)} ({lse.dtype})")
    if scoring.window is not None and scoring.window < 1:
        raise ValueError(f"window is {scoring.window}: give at least 1, or None for no window")
    if scoring.softcap is not None and not scoring.softcap > 0:
        raise ValueError(f"softcap is {scoring.softcap}: give a positive number, or None for none")
    if rows is not None and not 0 <= rows[0] < rows[1] <= n:
        raise ValueError(f"rows is {rows}: give a range that is not empty, within 0 and {n}")
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}: choose one of {', '.join(get_args(Pooling))}")
    if pooling is not None and rows is not None:
        raise ValueError("a map is of all rows: read the sums of some rows without one")
    if pooling is not None and not 1 <= pixels <= 1024:
        raise ValueError(f"pixels is {pixels}: give 1 to 1024")
    return (0, n) if rows is None else rows
