"""Decode attention over our stores: dense, ragged, bit-packed and sparse, one query a sequence, beside the full cache.

Heads are those of Llama 3.1 8B (32 query heads, 8 KV heads, head size 128) and of the default model (9, 3, 64); errors
at head sizes 64, 96 and 256 too. *Times as fast* is against the fastest way of PyTorch's SDPA over the full cache of
the same shape, measured just before. WORKBENCH_SWEEP=1 first tries configurations of the kernel for sparse rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.baselines import fastest
from bench.measure import failures, relative_error, run_poisoned, time_us
from workbench_kernels.building import sparse_rows
from workbench_kernels.decode import decode_dense, decode_packed
from workbench_kernels.decode_bitmap import decode_bitmap
from workbench_kernels.dispatch import WithKernel
from workbench_kernels.gpu import bitmap
from workbench_kernels.rows import PackedRows, Ragged, SparseRows
from workbench_kernels.scoring import Scoring


class Heads(NamedTuple):
    """Query heads, KV heads, head size."""

    queries: int
    kv: int
    width: int


LLAMA, DEFAULT = Heads(32, 8, 128), Heads(9, 3, 64)
LENGTHS, BATCHES = (8 << 10, 32 << 10, 128 << 10), (1, 8)
SHORT = (2 << 10, 8 << 10)  # of the default model, which knows 8,192 positions
KEPT = (0.5, 0.25, 0.1)
BITS, GROUP, TAIL = (8, 4, 2), 64, 128  # rows or channels that share a scale; newest rows, whole
PRUNED, RECENT = 0.7, 32  # of sparse rows: the share of numbers dropped; newest rows, whole

Rows = Ragged | PackedRows | SparseRows
Row = dict[str, Any]


def rows(quick: bool) -> Iterator[Row]:
    """Errors, then times, the longest caches first; quick: the shortest alone."""
    if os.environ.get("WORKBENCH_SWEEP"):
        yield from _sweep(LENGTHS[0] if quick else LENGTHS[-1])
    yield from _errors()
    for heads, lengths in ((LLAMA, LENGTHS), (DEFAULT, SHORT)):
        for n in reversed(lengths[: 1 if quick else None]):
            for batch in reversed(BATCHES):
                yield from _times(heads, batch, n)


def _times(heads: Heads, batch: int, n: int) -> Iterator[Row]:
    case = {"heads": list(heads), "batch": batch, "n": n}
    query, full = _query(heads, batch), _dense(heads, batch, n)
    keys, values = (x.data.view(batch, heads.kv, n, heads.width) for x in full)
    way, base = fastest(query.view(batch, heads.queries, 1, heads.width), keys, values)

    def timed(what: str, sides: tuple[Rows, Rows], kept: float = 1.0) -> Row:
        us = time_us(partial(_attend, query, *sides), milliseconds=40)
        return {"what": what, **case, "kept": kept, "bytes": _nbytes(*sides), "us": us, "speedup": base / us}

    yield {"what": "full cache, fastest SDPA", "way": way, **case, "kept": 1.0, "bytes": _nbytes(*full), "us": base}
    yield timed("dense", full)
    for share in KEPT:
        yield timed("ragged", (_ragged(full[0], n, share), _ragged(full[1], n, share)), share)
    sparse = tuple(_sparse(x, n) for x in full)
    del full, keys, values
    yield timed(f"bitmap, {PRUNED:.0%} pruned", (sparse[0], sparse[1]))
    del sparse
    for bits in BITS:
        yield timed(f"{bits} bit, group {GROUP}", packed(heads, batch, n, bits))


def _attend(query: Tensor, keys: Rows, values: Rows, **options: Any) -> Tensor:
    """The newest token's attention, by the kernel for what is held."""
    return _function(keys)(query, keys, values, Scoring(query.shape[-1] ** -0.5), **options)[0]


def _function(rows: Rows) -> WithKernel[..., tuple[Tensor, Tensor | None]]:
    functions: dict[type, WithKernel[..., tuple[Tensor, Tensor | None]]]
    functions = {Ragged: decode_dense, PackedRows: decode_packed, SparseRows: decode_bitmap}
    return functions[type(rows)]


def _query(heads: Heads, batch: int, queries: int = 1) -> Tensor:
    return torch.randn(batch * heads.queries, queries, heads.width, dtype=torch.bfloat16, device="cuda")


def _dense(heads: Heads, batch: int, n: int) -> tuple[Ragged, Ragged]:
    shape = batch * heads.kv, n, heads.width
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Ragged.of(keys), Ragged.of(values)


def _ragged(full: Ragged, n: int, share: float) -> Ragged:
    """The first rows of each head, from half to one and a half times `share` of them, `share` in all."""
    spread = torch.linspace(0.5, 1.5, len(full.starts), dtype=torch.float64)
    lengths = (spread * share * n).round().clamp(1, n).to(torch.int32)
    return full._replace(lengths=lengths.cuda(), longest=int(lengths.max()))


def _sparse(full: Ragged, n: int, pruned: float = PRUNED) -> SparseRows:
    """The largest numbers of each row but a head's last."""
    heads, width = len(full.starts), full.data.shape[1]
    data = full.data.view(heads, n, width)
    numbers, bits = sparse_rows(data[:, : n - RECENT].contiguous(), width - int(width * pruned), torch.bfloat16)
    front = Ragged(numbers, full.starts // n * (n - RECENT), full.lengths - RECENT, n - RECENT)
    return SparseRows(front, front._replace(data=bits), Ragged.of(data[:, n - RECENT :]))


def packed(heads: Heads, batch: int, n: int, bits: int, group: int = GROUP) -> tuple[PackedRows, PackedRows]:
    """Random codes, with scales and zeros as numbers about as large as 1 would have them, and a tail."""
    count, width = batch * heads.kv, heads.width
    front = (n - TAIL) // group * group
    steps = 2**bits - 1

    def alike(data: Tensor) -> Ragged:
        per_head = len(data) // count
        starts = torch.arange(count, dtype=torch.int32, device="cuda") * per_head
        return Ragged(data, starts, torch.full_like(starts, per_head), per_head)

    def side(axis: Any) -> PackedRows:
        across = (front // group, width) if axis == "channel" else (front, -(-width // group))
        scale = (4.0 + torch.rand(count * across[0], across[1], device="cuda")) / steps
        zero = -scale * steps / 2 + 0.1 * torch.randn_like(scale)
        codes = torch.randint(256, (count * front, -(-width * bits // 8)), dtype=torch.uint8, device="cuda")
        tail = torch.randn(count, n - front, width, dtype=torch.bfloat16, device="cuda")
        return PackedRows(alike(codes), alike(scale.half()), alike(zero.half()), Ragged.of(tail), bits, group, axis)

    return side("channel"), side("token")


def _nbytes(*sides: Rows) -> int:
    """What a step has to read: the rows there are, not the room for more."""
    total = 0
    for each in sides:
        parts: tuple[Ragged, ...] = (each,) if isinstance(each, Ragged) else ()
        if isinstance(each, PackedRows):
            parts = tuple(part for part in (each.codes, each.scale, each.zero, each.tail) if part is not None)
        elif isinstance(each, SparseRows):
            parts = each.numbers, each.bitmap, each.tail
        total += sum(int(part.lengths.sum()) * part.data.shape[1] * part.data.element_size() for part in parts)
    return total


# -------------------------------------------------------------------------------------------------------------- errors


def _errors() -> Iterator[Row]:
    """Against float64, of outputs in memory that was full of NaN."""
    n = 4099
    lengths = torch.tensor([n, 1, 63, 0, 1025, 4000, 129, 2048], dtype=torch.int32, device="cuda")
    for heads in (LLAMA, DEFAULT, Heads(32, 8, 96), Heads(32, 8, 256)):
        keys, values = _dense(heads, 1, n)
        some = lengths[: heads.kv]
        for queries in (1, 5):
            yield _checked("dense", heads, queries, keys, values)
            parts = (x._replace(lengths=some) for x in (keys, values))
            yield _checked("ragged", heads, queries, *parts)
        sides = _sparse(keys, n), _sparse(values, n)
        for queries in (1, 5):
            yield _checked(f"bitmap, {PRUNED:.0%} pruned", heads, queries, *sides)
    for heads in (LLAMA, DEFAULT, Heads(32, 8, 96)):
        for bits in BITS:
            for group in (64, 32):
                yield _checked(f"{bits} bit, group {group}", heads, 1, *packed(heads, 1, n, bits, group))
    yield _checked(f"4 bit, group {GROUP}", LLAMA, 5, *packed(LLAMA, 1, n, 4))


def _checked(what: str, heads: Heads, queries: int, keys: Rows, values: Rows) -> Row:
    """One comparison; several queries are the newest tokens, of which each sees those before it."""
    query, options = _query(heads, 1, queries), {}
    if queries > 1:
        options["query_positions"] = torch.arange(4099 - queries, 4099, device="cuda")
    got = run_poisoned(partial(_attend, query, keys, values, **options))
    wanted, _ = _function(keys).reference(query.double(), keys, values, Scoring(query.shape[-1] ** -0.5), **options)
    return {"what": what, "heads": list(heads), "queries": queries, "error": relative_error(got, wanted)}


# -------------------------------------------------------------------------------------------------------------- sweeps


def _sweep(n: int) -> Iterator[Row]:
    """Times of the kernel for sparse rows in each configuration, and its largest error at a few head sizes."""
    query, full = _query(LLAMA, 8), _dense(LLAMA, 8, n)
    yield {"what": "sweep, dense", "n": n, "us": time_us(partial(_attend, query, *full), milliseconds=25)}
    sparse = _sparse(full[0], n), _sparse(full[1], n)
    del full
    cases = [_sweep_case(heads, queries) for heads in SWEPT for queries in (1, 5)]
    for config in BITMAP_CONFIGS:
        row = {"what": "sweep, bitmap", "heads": list(LLAMA), "batch": 8, "n": n, "config": str(tuple(config))}
        with failures(row):  # a configuration may need more than there is
            work = partial(bitmap.decode_bitmap, query, *sparse, Scoring(0.1), config=config)
            row |= {"bytes": _nbytes(*sparse), "us": time_us(work, milliseconds=25)}
            row["error"] = max(relative_error(case(config=config)[0], wanted) for case, wanted in cases)
        yield row


def _sweep_case(heads: Heads, queries: int) -> tuple[Callable[..., Any], Tensor]:
    """Attention over a little, all but its configuration, and what it should be."""
    n = 1043
    keys, values = (_sparse(x, n) for x in _dense(heads, 1, n))
    query = _query(heads, 1, queries)
    options: dict[str, Any] = {"scoring": Scoring(heads.width**-0.5)}
    if queries > 1:
        options["query_positions"] = torch.arange(n - queries, n, device="cuda")
    wanted, _ = decode_bitmap.reference(query.double(), keys, values, **options)
    return partial(bitmap.decode_bitmap, query, keys, values, **options), wanted


SWEPT = (LLAMA, DEFAULT, Heads(32, 8, 96), Heads(32, 8, 256))
BITMAP_CONFIGS = [bitmap.Config(4, 16, 3), bitmap.Config(4, 16, 2), bitmap.Config(2, 16, 7), bitmap.Config(1, 16, 12)]
