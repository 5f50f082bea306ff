"""What a layer's attention looks like as a whole, read beside it: the n x n matrix never exists."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.attention_statistics import Pooling, Reading, cell_edges, check_reading, score_blocks
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import log_sums


def _takes(query: Tensor, key: Tensor, lse: Tensor | None, scoring: Scoring) -> bool:
    return scoring.plain and on_gpu(query, key, lse)


@with_kernel("gpu.reading:read_attention", when=_takes)
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
    the last n keys. scoring: as the layer attends; a row sees `window` keys, its own included, or those of its
    chunk (in plain PyTorch).
    lse: each row's log-sum-exp [h, n] float32, sinks included, which flash attention leaves; found here if it is not
    given, which takes a pass of its own. So does the entropy, on a GPU, where lse was given; where not, both are one
    pass.
    rows: of which rows `sums` and `most` are, half-open (default: all; not together with a map).
    pooling: how weights become the cells of a map of at most `pixels` x `pixels` (<= 1024), None: no map. Cell i of c
    begins at position i * n // c. "mean" counts the keys that a row does not see as zero.

    Deterministic on any device. Memory: the results; on a GPU 16 MiB more where several blocks of columns share a cell
    of the map; in plain PyTorch, which computes
    in float32, or float64 if given that, a few blocks of rows.
    Raises ValueError for what does not fit together.
    """
    first, last = check_reading(query, key, scoring, lse, rows, pooling, pixels)
    (h, n, _), m = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    row_lse = torch.empty(h, n, dtype=wide, device=device) if lse is None else lse
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
    for block, scores in score_blocks(query, key, scoring, wide):
        if lse is None:
            row_lse[:, block] = log_sums(scores, scoring)[..., 0]
        logs = scores - row_lse[:, block, None]
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
    return Reading(row_lse, received, largest, spread, cells)
