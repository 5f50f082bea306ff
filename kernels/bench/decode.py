"""Decode attention over our stores: dense, ragged and bit-packed, one query a sequence, beside the full cache.

Shapes: 32 query heads, 8 KV heads, head size 128; errors at head sizes 64, 96 and 256 too. WORKBENCH_SWEEP=1 first
tries the packed kernel's configurations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.measure import relative_error, run_poisoned, time_us
from workbench_kernels.decode import decode_dense, decode_packed, softmax_over
from workbench_kernels.gpu.packed import Config
from workbench_kernels.gpu.packed import decode_packed as packed_kernel
from workbench_kernels.rows import PackedRows, Ragged

HEADS, KV_HEADS, WIDTH = 32, 8, 128
LENGTHS, BATCHES = (8 << 10, 32 << 10, 128 << 10), (1, 8)
GROUP, TAIL = 64, 128  # rows or channels that share a scale; newest rows, whole
SWEEP = (
    Config(2, 64, 1, 3, 4),
    Config(2, 64, 1, 4, 4),
    Config(2, 64, 1, 3, 5, 200),
    Config(4, 64, 1, 3, 2),
    Config(1, 64, 1, 3, 8),
)


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Errors, then times; quick: the shortest caches alone."""
    yield from _errors()
    if os.environ.get("WORKBENCH_SWEEP"):
        yield from _sweep()
    for n in LENGTHS[: 1 if quick else None]:
        for batch in BATCHES:
            full = _dense(batch, n)
            query = _query(batch)
            yield _timed("dense, all kept", batch, n, _nbytes(*full), lambda q=query, f=full: _attend(q, *f))
            for share in (0.5, 0.25):
                part = tuple(_ragged(x, n, share, batch) for x in full)
                what = f"ragged, {share:.0%} kept"
                yield _timed(what, batch, n, _nbytes(*part), lambda q=query, p=part: _attend(q, *p))
            del full
            for bits in (8, 4, 2):
                held = packed(batch * KV_HEADS, n, WIDTH, bits)
                yield _timed(
                    f"{bits} bit, group {GROUP}",
                    batch,
                    n,
                    _nbytes(*held),
                    lambda q=query, h=held: _attend_packed(q, *h),
                )
                del held


def _attend(query: Tensor, keys: Ragged, values: Ragged) -> Tensor:
    return decode_dense(query, keys, values, scale=query.shape[-1] ** -0.5)[0]


def _attend_packed(query: Tensor, keys: PackedRows, values: PackedRows) -> Tensor:
    return decode_packed(query, keys, values, scale=query.shape[-1] ** -0.5)[0]


def _timed(what: str, batch: int, n: int, nbytes: int, work: Any, **more: Any) -> dict[str, Any]:
    return {"what": what, "batch": batch, "n": n, "bytes": nbytes, "us": time_us(work, milliseconds=40), **more}


def _query(batch: int, queries: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(batch * HEADS, queries, width, dtype=torch.bfloat16, device="cuda")


def _dense(batch: int, n: int, width: int = WIDTH) -> tuple[Ragged, Ragged]:
    data = [torch.randn(batch * KV_HEADS, n, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    return Ragged.of(data[0]), Ragged.of(data[1])


def _ragged(full: Ragged, n: int, share: float, batch: int) -> Ragged:
    """The first rows of each head, from half to one and a half times `share` of them, `share` in all."""
    spread = torch.linspace(0.5, 1.5, KV_HEADS, dtype=torch.float64).repeat(batch)
    lengths = (spread * share * n).round().clamp(1, n).to(torch.int32)
    return full._replace(lengths=lengths.cuda(), longest=int(lengths.max()))


def packed(heads: int, n: int, width: int, bits: int, tail: int = TAIL, group: int = GROUP) -> tuple[PackedRows, ...]:
    """Random codes, with scales and zeros as numbers about as large as 1 would have them, and a tail."""

    def alike(count: int, across: int) -> Ragged:
        starts = torch.arange(heads, dtype=torch.int32, device="cuda") * count
        lengths = torch.full_like(starts, count)
        return Ragged(torch.empty(0, across), starts, lengths, count)

    front = (n - tail) // group * group
    steps = 2**bits - 1

    def side(axis: Any) -> PackedRows:
        per_head, across = (front // group, width) if axis == "channel" else (front, -(-width // group))
        nbytes = -(-width * bits // 8)
        codes, numbers = alike(front, nbytes), alike(per_head, across)
        scale = (4.0 + torch.rand(heads * per_head, across, device="cuda")) / steps
        return PackedRows(
            codes._replace(data=torch.randint(256, (heads * front, nbytes), dtype=torch.uint8, device="cuda")),
            numbers._replace(data=scale.half()),
            numbers._replace(data=(-scale * steps / 2 + 0.1 * torch.randn_like(scale)).half()),
            Ragged.of(torch.randn(heads, n - front, width, dtype=torch.bfloat16, device="cuda")),
            bits, group, axis,
        )  # fmt: skip

    return side("channel"), side("token")


def _nbytes(*held: Ragged | PackedRows) -> int:
    """What a step has to read: the rows there are, not the room for more."""
    total = 0
    for each in held:
        parts = (each.codes, each.scale, each.zero, each.tail) if isinstance(each, PackedRows) else (each,)
        total += sum(int(part.lengths.sum()) * part.data.shape[1] * part.data.element_size() for part in parts)
    return total


def _errors() -> Iterator[dict[str, Any]]:
    """Against float64, of outputs in memory that was full of NaN."""
    for width in (64, 96, 128, 256):
        for queries in (1, 5):
            keys, values = _dense(1, 4099, width)
            lengths = torch.tensor([4099, 1, 63, 0, 1025, 4000, 129, 2048], dtype=torch.int32, device="cuda")
            for name, k, v in (
                ("dense", keys, values),
                ("ragged", keys._replace(lengths=lengths), values._replace(lengths=lengths)),
            ):
                query = _query(1, queries, width)
                got = run_poisoned(lambda q=query, k=k, v=v: _attend(q, k, v))
                yield {"what": f"{name}, head size {width}", "queries": queries, "error": _error(query, got, k, v)}
    for width, bits, group in [(w, b, g) for w in (128, 64, 96) for b in (2, 4, 8) for g in (64, 32)]:
        keys, values = packed(KV_HEADS, 4099, width, bits, group=group)
        query = _query(1, 1, width)
        got = run_poisoned(lambda q=query, k=keys, v=values: _attend_packed(q, k, v))
        what = f"{bits} bit, group {group}, head size {width}"
        yield {"what": what, "queries": 1, "error": _error(query, got, keys, values)}


def _error(query: Tensor, got: Tensor, keys: Ragged | PackedRows, values: Ragged | PackedRows) -> float:
    rows_of, real = keys.padded()
    wanted, _ = softmax_over(query.double(), rows_of, values.padded()[0], real[:, None], scale=query.shape[-1] ** -0.5)
    return relative_error(got, wanted)


def _sweep() -> Iterator[dict[str, Any]]:
    for bits in (2, 4):
        keys, values = packed(8 * KV_HEADS, 128 << 10, WIDTH, bits)
        query = _query(8)
        for config in SWEEP:
            yield _timed(
                f"sweep, {bits} bit", 8, 128 << 10, _nbytes(keys, values),
                lambda c=config, q=query, k=keys, v=values: packed_kernel(q, k, v, scale=0.1, config=c),
                config=str(tuple(config)),
            )  # fmt: skip
