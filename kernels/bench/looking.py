"""Looking at a long prompt in a session: heads, maps, sums, outliers, quality, and new budgets of all that scores.

A model shaped like Llama 3.1 8B with random weights has read 32,768 random tokens; no time depends on what they are.
*First* is the first call of the process, kernels compiled or fetched from their cache included; then everything that a
session remembers is forgotten before each call, but for new budgets, which follow a plan. Times are those that a user
waits. WORKBENCH_SWEEP=1 tries every configuration of the kernel that judges heads; WORKBENCH_PROFILE=1 says on the
standard error where the time of each first call and of a later one goes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from cProfile import Profile
from dataclasses import asdict, replace
from functools import partial
from pstats import Stats
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from bench.end_to_end import eight_billion
from bench.measure import failures, peak_bytes, relative_error, run_poisoned, time_us
from workbench import registry
from workbench.core.memo import Memo
from workbench.errors import BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench_kernels import RowStatistics, Scoring
from workbench_kernels import row_statistics as reference
from workbench_kernels.gpu.row_statistics import CONFIGS, Config, row_statistics

TOKENS, FEW = 32 << 10, 2 << 10
HEADS, KV_HEADS, WIDTH = 32, 8, 128
SCORING = Scoring(WIDTH**-0.5)
CHECKED = (2048, 1999)
HOW: dict[str, Any] = {"early": 4, "recent": 32}
BUDGETS = (0.25, 0.2, 0.33, 0.15, 0.4)  # of what is left above the least
ADAPTIVE = ("adakv", "expected-attention", "hack", "prefixkv", "pyramidkv", "scalekv", "uncomp")  # they come first
AGAIN = ("kvzip", "evopress-kv", "headkv", "headkv-r2")  # the model reads again before they can score
JUDGED, ANSWER = ("full", "snapkv", "kivi", "h2o"), 32
SHOWN = 14  # functions of a profile


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """What must hold first: plans, budgets, quality, heads and maps; then the rest, with errors against float64, and
    last the methods that read again. quick: a small model and a short prompt.
    """
    tokens = FEW if quick else TOKENS
    session = reading(tokens, quick)
    works = looks(session)
    first = ("H2O's first plan", "heads()", "one map", "all maps")
    yield from looked(session, tokens, {name: works.pop(name) for name in first[:1]})
    yield from budgets(session, tokens, again=False)
    yield from qualities(session, tokens)
    yield from looked(session, tokens, {name: works.pop(name) for name in first[1:]})
    yield from fresh(tokens)
    yield from looked(session, tokens, works)
    for n in CHECKED:
        yield from errors(n)
    if os.environ.get("WORKBENCH_SWEEP"):
        yield from sweep(tokens)
    yield from budgets(session, tokens, again=True)


def errors(n: int) -> Iterator[dict[str, Any]]:
    """Relative errors of the norms of all row statistics, outputs poisoned, against the reference in float64."""
    query, key, tokens = tensors(n)
    cases = {
        "all": SCORING,
        "window and softcap": replace(SCORING, window=300, softcap=20.0),
        "sinks": replace(SCORING, sinks=torch.linspace(-2, 8, HEADS, device="cuda")),
    }
    bins = 1 + (n - 1).bit_length()
    for name, scoring in cases.items():
        exact = reference.reference(query.double(), key.double(), scoring, tokens, bins=bins, **HOW)
        row: dict[str, Any] = {"what": f"row statistics, {name}", "n": n}
        found: tuple[Tensor | None, ...] = (None,) * len(RowStatistics._fields)
        with failures(row):
            found = run_poisoned(partial(row_statistics, query, key, scoring, tokens, bins=bins, **HOW))
        if "failed" in row:
            yield row
        for field, ours, theirs in zip(RowStatistics._fields, found, exact, strict=True):
            if ours is not None:
                yield {"what": f"row statistics, {name}: {field}", "n": n, "error": relative_error(ours, theirs)}


def sweep(n: int) -> Iterator[dict[str, Any]]:
    """Row statistics of a layer by each configuration."""
    query, key, tokens = tensors(n)
    for number, config in enumerate(CONFIGS):

        def work(config: Config = config) -> RowStatistics:
            return row_statistics(query, key, SCORING, tokens, bins=1 + (n - 1).bit_length(), config=config, **HOW)

        row = {"what": "sweep", "n": n, "number": number, **asdict(config)}
        with failures(row):
            row |= {"us": time_us(work, graph=False, milliseconds=40), "flops": flops(n)}
        yield row


def tensors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of a layer, and ids of which many come again."""
    query = 2 * torch.randn(HEADS, n, WIDTH, dtype=torch.bfloat16, device="cuda")
    key = torch.randn(KV_HEADS, n, WIDTH, dtype=torch.bfloat16, device="cuda")
    return query, key, torch.randint(200, (n,), device="cuda")


def flops(n: int) -> int:
    """Operations of the products of all of a layer's queries with the keys they see."""
    return HEADS * WIDTH * n * (n + 1)


def reading(tokens: int, quick: bool) -> wb.Session:
    """A session that has read so many random tokens."""
    model = small() if quick else eight_billion()
    session = wb.Session((model, None))
    session.read(torch.randint(model.config.vocab_size, (tokens,)))
    gc.collect()
    torch.cuda.empty_cache()
    return session


def small() -> PreTrainedModel:
    """Two layers of the same heads."""
    config = LlamaConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=WIDTH, vocab_size=1000, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    made: PreTrainedModel = model.to("cuda", torch.bfloat16).eval()
    return made


def looks(session: wb.Session) -> dict[str, tuple[Callable[[], Any], int]]:
    """What a session shows: what is called, and how many layers' products that takes, where that is what takes time."""
    layers = session.facts.layers
    layer, n = layers // 2, session.readings.of_prompt().tokens
    end = (n - 512, n)
    return {
        "H2O's first plan": (lambda: session.plan("h2o", budget=0.25), 2 * layers),
        "heads()": (session.heads, layers),
        "one map": (lambda: session.attention(layer, 5), 0),
        "all maps": (session.attention_grid, 2 * layers),
        "one map, another head": (lambda: session.attention(layer - 1, 9), 0),
        "one map, 512 tokens of it": (lambda: session.attention(layer, 5, rows=end, cols=end), 0),
        "what one head's tokens receive": (lambda: session.received(layer, 5), 0),
        "outliers of keys": (lambda: session.outliers("keys"), 0),
        "SnapKV's first plan": (lambda: session.plan("snapkv", budget=0.25), 0),
        "AdaKV's first plan": (lambda: session.plan("adakv", budget=0.25), 0),
        "one map under SnapKV": (lambda: session.attention(layer, 5, "snapkv", budget=0.25), 0),
        "heads() under SnapKV": (lambda: session.heads("snapkv", budget=0.25), 0),
    }


def looked(session: wb.Session, n: int, works: dict[str, tuple[Callable[[], Any], int]]) -> Iterator[dict[str, Any]]:
    """The first call of each, and later ones."""
    for name, (work, passes) in works.items():
        row: dict[str, Any] = {"what": name, "n": n}
        with failures(row):
            forget(session)
            row["first"] = 1e6 * waited(work, f"{name}, first call")
            later = []
            for _ in range(1 if row["first"] > 5e6 else 3):
                forget(session)
                later.append(waited(work))
            row["us"] = 1e6 * median(later)
            if passes:
                row["flops"] = passes * flops(n)
            forget(session)
            row["peak"] = peak_bytes(work)
            if os.environ.get("WORKBENCH_PROFILE"):
                forget(session)
                waited(work, f"{name}, a later call")
        yield row


def fresh(n: int) -> Iterator[dict[str, Any]]:
    """The first call of a process that finds its kernels compiled, of a small model whose layers are as large."""
    for name in ("one map", "heads()", "H2O's first plan"):
        row: dict[str, Any] = {"what": f"{name}, a new process", "n": n, "layers": 2}
        with failures(row):
            run = [sys.executable, "-c", f"from bench.looking import alone; alone({name!r}, {n})"]
            done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60)
            row["first"] = float(done.stdout.splitlines()[-1])
        yield row


def alone(name: str, n: int) -> None:
    """Print the microseconds of a first look, in a process of its own."""
    session = reading(n, quick=True)
    print(1e6 * waited(looks(session)[name][0]))


def qualities(session: wb.Session, n: int) -> Iterator[dict[str, Any]]:
    """What comparing an answer with the full cache's takes, the latter's own answer included."""
    for key in JUDGED:
        row: dict[str, Any] = {"what": f"quality of {ANSWER} tokens, {key}", "n": n}
        with failures(row):
            times = []
            for name in (f"{row['what']}, first call", "", ""):
                forget(session)
                budget = None if key in ("full", "kivi") else 0.25
                run = session.run(key, max_new_tokens=ANSWER, budget=budget)
                times.append(waited(partial(getattr, run, "quality"), name))
                run.release()
            row |= {"first": 1e6 * times[0], "us": 1e6 * median(times[1:])}
        yield row


def budgets(session: wb.Session, n: int, *, again: bool) -> Iterator[dict[str, Any]]:
    """The first plan of every method that scores, and what a new budget takes then; again: of those that read again."""
    methods = [method for method in registry.registered("kv") if issubclass(method, KVMethod)]
    chosen = [each.key for each in methods if "score" in each.supplied and "read" not in each.supplied]
    forget(session)
    for key in sorted((key for key in chosen if (key in AGAIN) is again), key=lambda key: key not in ADAPTIVE):
        row: dict[str, Any] = {"what": f"new budget, {key}", "n": n}
        with failures(row):
            least, row["first"] = least_budget(session, key)
            shares = [least + (1 - least) * share for share in BUDGETS]
            row["us"] = 1e6 * median(waited(partial(session.plan, key, budget=share)) for share in shares)
            if os.environ.get("WORKBENCH_PROFILE") and row["us"] > 8e3:
                waited(partial(session.plan, key, budget=0.9), f"new budget, {key}")
        yield row


def least_budget(session: wb.Session, key: str) -> tuple[float, float]:
    """The least budget that the method can be planned with, and the microseconds of the first plan."""
    refused: list[float] = []

    def first() -> None:
        try:
            session.plan(key, budget=1e-6)
        except BudgetTooSmall as refusal:
            refused.append(refusal.smallest)

    taken = 1e6 * waited(first)
    return (refused or [1e-6])[0], taken


def forget(session: wb.Session) -> None:
    """Let a session forget what it computed of its prompt."""
    trace = session.readings.of_prompt()
    layers = tuple(replace(layer) for layer in trace.layers)
    session.readings.restore(replace(trace, layers=layers, memo=Memo()), ())
    gc.collect()


def waited(work: Callable[[], Any], profiled: str = "") -> float:
    """Seconds until what `work()` does is done; profiled: what to call its profile, if one is asked for."""
    profile = Profile() if profiled and os.environ.get("WORKBENCH_PROFILE") else None
    torch.cuda.synchronize()
    began = perf_counter()
    if profile is None:
        work()
    else:
        profile.runcall(work)
    torch.cuda.synchronize()
    seconds = perf_counter() - began
    if profile is not None:
        print(f"--- {profiled}: {seconds:.3f} s", file=sys.stderr)
        Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(SHOWN)
    return seconds
