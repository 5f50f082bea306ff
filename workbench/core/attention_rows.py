"""Exact softmax attention, streamed in blocks of rows: the n x n matrix never exists.

Whatever reads attention (pooled maps, column sums, entropies; the scores of H2O, SnapKV and others) reads it from here,
so all of them see the same numbers. Visibility comes from the true positions of queries and keys, never from slot
numbers: it stays right after eviction, when each KV head may hold different positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench import arguments
from workbench.errors import InputError
from workbench.progress import Progress
from workbench_kernels import Scoring
from workbench_kernels.softmax import normalised

BLOCK_BYTES = 64 * 2**20
# On a GPU small blocks only wait for one another: 131,072 tokens take 1.0 s in blocks of 512 MiB, 3.4 s in those of 64.
_CUDA_BLOCK_BYTES = 512 * 2**20
# On CPUs a block that stays in the caches is up to three times faster than a large one (measured: 64 to 128 rows of
# 2,048 keys).
_CPU_CACHE_BYTES = 8 * 2**20
_CPU_MAX_ROWS = 128
_CPU_MIN_ROWS = 16


class RowBlock(NamedTuple):
    """Some rows of the attention matrix, cut to the keys that at least one of them can see."""

    rows: slice
    """which queries"""
    keys: slice
    """which keys: every key outside has weight zero in all these rows"""
    probs: Tensor
    """[h, rows, keys] float32, owned by the receiver; each row sums to 1, or is all zero where a query sees no key;
    sinks take a part of the 1"""


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield `(rows, probs)`: a slice of queries and their whole softmax rows, [h, rows, nk] float32.

    Same arguments as `row_blocks`, which is up to twice as fast where invisible keys need not be written out as zeros.
    """
    nk = keys.shape[-2]
    for block in row_blocks(
        queries,
        keys,
        scoring,
        query_positions=query_positions,
        key_positions=key_positions,
        block_bytes=block_bytes,
        progress=progress,
    ):
        left, right = block.keys.start, nk - block.keys.stop
        yield block.rows, pad(block.probs, (left, right)) if left or right else block.probs


def row_blocks(
    queries: Tensor,
    keys: Tensor,
    scoring: Scoring,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> Iterator[RowBlock]:
    """Yield the causal softmax attention of `queries` over `keys`, block by block from the first query to the last.

    queries: [h, nq, d] and keys: [k, nk, d], any dtype, after the rotary embedding; computed in float32. h is a
    multiple of k: query head i reads KV head i // (h // k).
    scoring: how products become scores, and how far back a query sees.
    query_positions: [nq], ascending; by default the queries are those of the last nq keys.
    key_positions: [nk], or [k, nk] where KV heads hold different positions; ascending; by default 0 .. nk - 1.
    block_bytes: upper bound of one block of scores (default 64 MiB, on a GPU 512 MiB). Up to three such blocks live at
    a time, beside a float32 copy of the keys.

    Raises InputError for shapes or positions that do not fit together.
    """
    check_scoring(scoring)
    h, nq, k, nk = _check(queries, keys, block_bytes)
    queries, keys_t = queries.detach(), keys.detach().float().transpose(1, 2)  # [k, d, nk]
    first, stop = visible_keys(
        nq, nk, query_positions, key_positions, scoring.window, kv_heads=k, chunk=scoring.chunk
    )  # [k or 1, nq]
    at, held = token_positions(nq, nk, query_positions, key_positions)  # [nq], [k or 1, nk]
    group = h // k
    if scoring.slopes is not None:
        at, held = at.to(queries.device), held.to(queries.device)
    rows_per_block = _rows_per_block(h * nk * 4, nq, block_bytes, queries.device)
    scratch = torch.empty(h * rows_per_block * nk, dtype=torch.float32, device=queries.device)

    starts = range(0, nq, rows_per_block)
    for start in starts if progress is None else progress.track(starts, "attention rows", len(starts)):
        rows = slice(start, min(nq, start + rows_per_block))
        r = rows.stop - rows.start
        first_r, stop_r = first[:, rows], stop[:, rows]
        low, high = int(first_r.min()), int(stop_r.max())
        if low >= high:  # nothing visible to any of these rows
            yield RowBlock(rows, slice(0, 0), queries.new_zeros((h, r, 0), dtype=torch.float32))
            continue
        c = high - low
        scores = scratch[: h * r * c].view(k, group * r, c)
        torch.baddbmm(  # beta=0: what lies in scratch is ignored
            scores,
            queries[:, rows].reshape(k, group * r, -1).float(),
            keys_t[:, :, low:high],
            beta=0,
            alpha=scoring.scale if scoring.softcap is None else scoring.scale / scoring.softcap,
            out=scores,
        )
        if scoring.softcap is not None:  # one pass over the scores fewer than `scoring.cap`
            scores.tanh_().mul_(scoring.softcap)
        by_kv = scores.view(k, group, r, c)
        if scoring.slopes is not None:
            offsets = scoring.offsets(at[rows.stop - 1], held[:, low:high])  # [k or 1, c]
            assert offsets is not None
            by_kv += scoring.biases(by_kv, offsets[:, None, None])
        _hide(by_kv, first_r - low, stop_r - low)
        chosen = None if scoring.chosen is None else scoring.chosen.visible(at[rows], held[:, low:high])
        if chosen is not None:  # [k or 1, r, c]
            by_kv.masked_fill_(~chosen.to(scores.device)[:, None], -torch.inf)
        probs = normalised(by_kv, scoring)
        blind = first_r >= stop_r
        if chosen is not None:
            blind = blind | (scores.view(k, group, r, c)[:, 0] == -torch.inf).all(dim=-1).cpu()
        if blind.any():  # the softmax of nothing is not a number; nothing was attended to
            probs.masked_fill_(blind[:, None, :, None].to(probs.device), 0.0)
        yield RowBlock(rows, slice(low, high), probs.view(h, r, c))
        del probs  # the receiver may have let go of it: do not hold it while the next one is made


class HeadGroup(NamedTuple):
    """Some query heads of a layer with their KV heads, to be worked on by themselves."""

    heads: slice
    """which query heads"""
    queries: Tensor
    """[h', nq, d]"""
    keys: Tensor
    """[k', nk, d]"""
    key_positions: Tensor | None
    """[nk] or [k', nk]"""
    progress: Progress | None
    """reports to the one that was given, as a part of the whole"""


def head_groups(
    queries: Tensor, keys: Tensor, key_positions: Tensor | None = None, progress: Progress | None = None
) -> list[HeadGroup]:
    """Divide queries [h, nq, d] and keys [k, nk, d] so that row_blocks works fastest: into KV heads where a few rows of
    all heads would not stay in a CPU's caches, else not at all.
    """
    (h, k), nk = (len(queries), len(keys)), keys.shape[1]
    if k < 2 or h % k or queries.device.type != "cpu" or h * nk * 4 * _CPU_MIN_ROWS <= _CPU_CACHE_BYTES:
        return [HeadGroup(slice(0, h), queries, keys, key_positions, progress)]
    each = h // k
    shared = key_positions is None or key_positions.ndim < 2 or len(key_positions) == 1
    parts = []
    for kv in range(k):
        heads = slice(kv * each, (kv + 1) * each)
        held = key_positions if shared or key_positions is None else key_positions[kv]
        steps = None if progress is None else progress.part(kv, k)
        parts.append(HeadGroup(heads, queries[heads], keys[kv : kv + 1], held, steps))
    return parts


def visible_keys(
    nq: int,
    nk: int,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    *,
    kv_heads: int = 1,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The half-open range of key slots that each query sees: `first`, `stop`, int64 [k, nq] on the CPU.

    k is 1 where all KV heads share one set of positions. Arguments as in `row_blocks`; window, chunk: as of a Scoring.
    """
    at, held = token_positions(nq, nk, query_positions, key_positions)
    if held.shape[0] not in (1, kv_heads):
        raise InputError(
            f"key_positions has {held.shape[0]} rows for {kv_heads} KV heads; give [nk] or [{kv_heads}, nk]"
        )
    at = at.expand(held.shape[0], nq).contiguous()
    stop = torch.searchsorted(held, at, right=True)
    begin = Scoring(1.0, window, chunk=chunk).begin(at)
    return torch.zeros_like(stop) if begin is None else torch.searchsorted(held, begin), stop


def token_positions(
    nq: int, nk: int, query_positions: Tensor | None, key_positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Positions of queries [nq] and of keys [k or 1, nk], int64 on the CPU, defaults filled in and checked."""
    held = torch.arange(nk) if key_positions is None else key_positions.detach().to("cpu", torch.int64)
    held = held.reshape(1, -1) if held.ndim < 2 else held.contiguous()
    if query_positions is not None:
        at = query_positions.detach().to("cpu", torch.int64).reshape(-1)
    elif nq > nk:
        raise InputError(f"{nq} queries but {nk} keys: give query_positions, which tokens the queries belong to")
    elif held.shape[0] > 1:
        raise InputError("KV heads hold different positions: give query_positions, which tokens the queries belong to")
    else:
        at = held[0, nk - nq :]
    for name, positions, n in (("query_positions", at, nq), ("key_positions", held, nk)):
        if positions.shape[-1] != n:
            raise InputError(f"{name} has {positions.shape[-1]} entries for {n} tokens")
        if (positions.diff(dim=-1) < 0).any():
            raise InputError(f"{name} must ascend: sort the tokens by position first")
    return at, held


def check_scoring(scoring: Scoring) -> None:
    """Raise BadParameter unless scores can be computed so."""
    arguments.number("scale", scoring.scale)
    if scoring.window is not None:
        arguments.whole("window", scoring.window, low=1)
    if scoring.chunk is not None:
        arguments.whole("chunk", scoring.chunk, low=1)
    if scoring.softcap is not None:
        arguments.number("softcap", scoring.softcap, low=0, above=True)


def _check(queries: Tensor, keys: Tensor, block_bytes: int | None) -> tuple[int, int, int, int]:
    if queries.ndim != 3 or keys.ndim != 3:
        raise InputError(
            f"queries must be [h, nq, d] and keys [k, nk, d], not {list(queries.shape)} and {list(keys.shape)}"
        )
    (h, nq, d), (k, nk, key_d) = queries.shape, keys.shape
    if d != key_d:
        raise InputError(f"queries have head size {d}, keys {key_d}: they must come from the same layer")
    if k == 0 or h % k:
        raise InputError(f"{h} query heads cannot share {k} KV heads: the first must be a multiple of the second")
    if block_bytes is not None:
        arguments.whole("block_bytes", block_bytes, low=1)
    return h, nq, k, nk


def _rows_per_block(row_bytes: int, nq: int, block_bytes: int | None, device: torch.device) -> int:
    if block_bytes is None:
        block_bytes = _CUDA_BLOCK_BYTES if device.type == "cuda" else BLOCK_BYTES
    rows = block_bytes // max(row_bytes, 1)
    if device.type == "cpu":
        in_cache = min(_CPU_MAX_ROWS, max(_CPU_MIN_ROWS, _CPU_CACHE_BYTES // max(row_bytes, 1)))
        rows = min(rows, in_cache)
    return max(1, min(rows, nq))


def _hide(scores: Tensor, first: Tensor, stop: Tensor) -> None:
    """Set scores [k, group, r, c] outside each row's [first, stop) to minus infinity; first and stop are [k or 1, r].

    Only the two bands of columns where rows differ are touched: most of a causal block is visible to all of its rows.
    """
    c = scores.shape[-1]
    begin, end = int(stop.min()), int(first.max())
    if begin < c:
        column = torch.arange(begin, c, device=scores.device)
        scores[..., begin:].masked_fill_((column >= stop.to(scores.device)[..., None])[:, None], -torch.inf)
    if end > 0:
        column = torch.arange(end, device=scores.device)
        scores[..., :end].masked_fill_((column < first.to(scores.device)[..., None])[:, None], -torch.inf)
