"""What can be read of a layer's attention beside its output, and what must hold of what it is read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

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


class RowStatistics(NamedTuple):
    """What was read of each row, float32 unless said otherwise. With sinks, their share of a row is none of these."""

    lse: Tensor
    """[h, n] natural logarithm of the row's sum of exp(score), sinks included"""
    entropy: Tensor
    """[h, n] -sum P log P over the keys it sees, in nats"""
    distance: Tensor
    """[h, n] sum of P times how many positions the key stands behind the row"""
    early: Tensor
    """[h, n] share that goes to the first positions"""
    follows: Tensor
    """[h, n] share that goes to earlier keys that follow an occurrence of the row's own token"""
    within: Tensor
    """[h, bins + 1, n] share that goes less than 2 ** b positions back, b being 0 .. bins - 1; then `recent`"""


def cell_edges(size: int, pixels: int, device: torch.device) -> Tensor:
    """Where the cells of at most `pixels` begin, and the last one ends: int64 [cells + 1]."""
    cells = min(pixels, size)
    return torch.arange(cells + 1, device=device) * size // cells


def score_blocks(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    dtype: torch.dtype,
    at: Tensor | None = None,
    held: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Scores [h, r, m] of consecutive blocks of rows, minus infinity where a row does not look.

    at: the rows' positions [n], by default those of the last keys; held: the keys' [k or 1, m], by default 0 .. m - 1.
    """
    (h, n, _), (k, m, _) = query.shape, key.shape
    keys = key.to(dtype).transpose(1, 2)
    cols = torch.arange(m, device=query.device)[None] if held is None else held
    places = torch.arange(m - n, m, device=query.device) if at is None else at
    step = max(1, _ROWS_BYTES // (4 * h * m))
    for start in range(0, n, step):
        block = slice(start, min(n, start + step))
        part = query[:, block].to(dtype).reshape(k, -1, query.shape[2])
        products = torch.matmul(part, keys).view(k, h // k, -1, m)
        visible = scoring.visible(places[block], cols)[:, None]
        offsets = scoring.offsets(places[block], cols)
        scores = scoring.scores(products, visible, None if offsets is None else offsets[:, None, None])
        yield block, scores.view(h, -1, m)


def before_each(tokens: Tensor, positions: Tensor) -> Tensor:
    """The token before each of the positions [k or 1, m]; -1 before the first, and for positions behind the text."""
    there = (positions > 0) & (positions < len(tokens))
    return torch.where(there, tokens[(positions - 1).clamp(0, len(tokens) - 1)], -1)


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
    _check_tensors(query, key, lse)
    _check_scoring(scoring)
    n = query.shape[1]
    if rows is not None and not 0 <= rows[0] < rows[1] <= n:
        raise ValueError(f"rows is {rows}: give a range that is not empty, within 0 and {n}")
    if pooling is not None:
        _check_map(pooling, rows, pixels)
    return (0, n) if rows is None else rows


def check_statistics(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    tokens: Tensor,
    early: int,
    recent: int,
    bins: int,
    held: Tensor | None,
) -> Tensor | None:
    """Raise ValueError for arguments of `row_statistics` that do not fit together; where keys stand, [k or 1, m]."""
    _check_tensors(query, key, None, evicted=held is not None)
    _check_scoring(scoring)
    (_, n, _), (k, m, _) = query.shape, key.shape
    positions = held if held is None or held.ndim == 2 else held[None]
    if positions is not None and (positions.shape not in ((1, m), (k, m)) or positions.is_floating_point()):
        raise ValueError(f"held must be positions [{m}] or [{k}, {m}], not {list(positions.shape)} {positions.dtype}")
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < n or (held is None and len(tokens) != m):
        raise ValueError(f"tokens must be the ids of all positions, not {list(tokens.shape)} {tokens.dtype}")
    for name, number in (("early", early), ("recent", recent), ("bins", bins)):
        if not 0 < number < 1 << 30:
            raise ValueError(f"{name} is {number}: give at least 1")
    if len(tokens) > 1 << bins - 1:
        raise ValueError(f"{bins} bins reach back {1 << bins - 1:,} positions, but there are {len(tokens):,} tokens")
    return positions


def _check_scoring(scoring: Scoring) -> None:
    window, softcap = scoring.window, scoring.softcap
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: give at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: give a positive number, or None for none")


def _check_tensors(query: Tensor, key: Tensor, lse: Tensor | None, *, evicted: bool = False) -> None:
    if query.ndim != 3 or key.ndim != 3 or query.shape[2] != key.shape[2] or query.dtype != key.dtype:
        raise ValueError(
            f"query must be [h, n, d] and key [k, m, d] of one dtype, not {list(query.shape)} ({query.dtype}) and "
            f"{list(key.shape)} ({key.dtype})"
        )
    (h, n, _), (k, m, _) = query.shape, key.shape
    if k == 0 or h == 0 or h % k:
        raise ValueError(f"{h} query heads cannot share {k} KV heads: the first must be a multiple of the second")
    if n < 1 or m < 1 or (n > m and not evicted):
        raise ValueError(f"{n} queries for {m} keys: they must be those of the last keys, and at least one")
    if lse is not None and (lse.shape != (h, n) or not lse.is_floating_point()):
        raise ValueError(f"lse must be [{h}, {n}] floating-point, not {list(lse.shape)} ({lse.dtype})")


def _check_map(pooling: Pooling, rows: tuple[int, int] | None, pixels: int) -> None:
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}: choose one of {', '.join(get_args(Pooling))}")
    if rows is not None:
        raise ValueError("a map is of all rows: read the sums of some rows without one")
    if not 1 <= pixels <= 1024:
        raise ValueError(f"pixels is {pixels}: give 1 to 1024")
