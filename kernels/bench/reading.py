"""Reading attention beside flash attention: column sums, pooled maps, log-sum-exps and entropies of one layer.

32 query heads, 8 KV heads, a head size of 128, bfloat16, causal. The measure is what the layer's own attention takes by
the fastest backend of PyTorch. WORKBENCH_SWEEP=1 tries every configuration first, and goes on with the fastest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.measure import failures, peak_bytes, relative_error, run_poisoned, time_us
from workbench_kernels import reading as references
from workbench_kernels.attention_statistics import Reading
from workbench_kernels.gpu.reading import CONFIGS, Config, read_attention
from workbench_kernels.scoring import Scoring

HEADS, KV_HEADS, WIDTH, PIXELS = 32, 8, 128, 512
SCORING = Scoring(WIDTH**-0.5)
LENGTHS = (8 << 10, 32 << 10, 128 << 10)
CHECKED = (2048, 2011)  # tokens; the second has no even cells
SWEPT = 128 << 10
SWEEP_SECONDS = 45.0
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
WANTED: dict[str, dict[str, Any]] = {
    "column sums": {},
    "column sums + map of maxima": {"pooling": "max"},
    "column sums + map of means": {"pooling": "mean"},
    "column sums + maxima": {"most": True},
}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """Errors against float64, then times; quick: the shortest prompt alone."""
    for n in CHECKED:
        yield from errors(n)
    config = None
    if os.environ.get("WORKBENCH_SWEEP"):
        swept = list(sweep(LENGTHS[0] if quick else SWEPT))
        yield from swept
        tried = [row for row in swept if row.get("us")]
        config = CONFIGS[int(min(tried, key=lambda row: float(row["us"]))["number"])] if tried else None
    for n in LENGTHS[: 1 if quick else None]:
        yield from times(n, config)


def tensors(n: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of a layer, with scores spread about as widely as those of a model."""
    query = 2 * torch.randn(HEADS, n, WIDTH, dtype=torch.bfloat16, device="cuda")
    return query, torch.randn(KV_HEADS, n, WIDTH, dtype=torch.bfloat16, device="cuda")


def errors(n: int) -> Iterator[dict[str, Any]]:
    """Relative errors of the norms of all that is read, outputs poisoned, against the reference in float64."""
    query, key = tensors(n)
    cases: dict[str, dict[str, Any]] = {
        "all": {"most": True, "entropy": True},
        "window and softcap": {"most": True, "entropy": True},
        "last rows": {"most": True, "rows": (n - 32, n)},
        "map of maxima": {"pooling": "max"},
        "map of means": {"pooling": "mean"},
        "small map of sums": {"pooling": "sum", "pixels": 5},
        "map of a window": {"pooling": "max", "pixels": 8},
    }
    scorings = {
        "window and softcap": replace(SCORING, window=300, softcap=20.0),
        "map of a window": replace(SCORING, window=300),
    }
    for name, how in cases.items():
        scoring = scorings.get(name, SCORING)
        exact = references.read_attention.reference(query.double(), key.double(), scoring, **how)
        for given in (False, True):
            lse = exact.lse.float() if given else None

            row: dict[str, Any] = {"what": name, "n": n}
            reading = (None,) * len(Reading._fields)
            with failures(row):
                reading = run_poisoned(partial(read_attention, query, key, scoring, lse=lse, **how))
            if "failed" in row:
                yield row
            for field, ours, theirs in zip(Reading._fields, reading, exact, strict=True):
                if ours is not None and theirs is not None and not (given and field == "lse"):
                    what = f"{name}: {field}, lse {'given' if given else 'found'}"
                    yield {"what": what, "n": n, "error": relative_error(ours, theirs)}


def sweep(n: int) -> Iterator[dict[str, Any]]:
    """Column sums and a map of maxima by each configuration, as far as the time reaches."""
    query, key = tensors(n)
    lse = read_attention(query, key, SCORING, sums=False).lse
    began = perf_counter()
    for number, config in enumerate(CONFIGS):
        if perf_counter() - began > SWEEP_SECONDS:
            return

        def work(config: Config = config) -> Reading:
            return read_attention(query, key, SCORING, lse=lse, pooling="max", pixels=PIXELS, config=config)

        row = {"what": "sweep", "n": n, "number": number, **asdict(config)}
        with failures(row):
            row |= {"us": time_us(work, graph=False, milliseconds=40), "flops": flops(n)}
        yield row


def times(n: int, config: Config | None) -> Iterator[dict[str, Any]]:
    """The layer's attention by PyTorch's backends, then what reading it takes; `speedup`: over the fastest of them."""
    query, key = tensors(n)
    fastest = None
    for name, backend in BACKENDS.items():
        row: dict[str, Any] = {"what": f"attention itself, {name}", "n": n}
        with failures(row):
            row["us"] = time_us(attention(query, key, backend), graph=False, milliseconds=40)
            row["flops"] = 2 * flops(n)
            fastest = min(row["us"], fastest or row["us"])
        yield row
    torch.cuda.empty_cache()
    lse = read_attention(query, key, SCORING, sums=False).lse
    works: dict[str, tuple[Callable[[], Reading], int]] = {
        "log-sum-exp": (lambda: read_attention(query, key, SCORING, sums=False), 1),
        "log-sum-exp + entropy": (lambda: read_attention(query, key, SCORING, sums=False, entropy=True), 1),
        "column sums + entropy": (lambda: read_attention(query, key, SCORING, lse=lse, entropy=True), 2),
    }
    for name, how in WANTED.items():
        chosen = None if "most" in how else config

        def work(how: dict[str, Any] = how, chosen: Config | None = chosen) -> Reading:
            return read_attention(query, key, SCORING, lse=lse, pixels=PIXELS, config=chosen, **how)

        works[name] = work, 1
    for name, (each, passes) in works.items():
        row = {"what": name, "n": n}
        with failures(row):
            row["peak"] = peak_bytes(each)
            row["us"] = time_us(each, graph=False, milliseconds=40)
            row["flops"] = passes * flops(n)
            row["speedup"] = None if fastest is None else fastest / row["us"]
        yield row


def attention(query: Tensor, key: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    """The layer's attention, with keys of every query head on its own, so that all backends take them."""
    q, k = query[None], key.repeat_interleave(HEADS // KV_HEADS, dim=0)[None]
    v = torch.randn_like(k)

    def work() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=True, scale=SCORING.scale)

    return work


def flops(n: int) -> int:
    """Operations of the products of all queries with the keys they see."""
    return HEADS * WIDTH * n * (n + 1)
