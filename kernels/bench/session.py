"""Every KV method in a session, as a user gets it: the shape of Llama 3.1 8B has read 32,768 tokens, and answers.

Weights and tokens are random numbers. Methods that take a budget get a quarter, otherwise all is as published. *us* is
a token's time in the last half of the answer, *first to last* the tokens a second over all of the answer but its first
token, capturing included. An answer that is cut off before lets kernels compile. *Bytes* are all weights that a token
needs and what the cache holds on the device: who attends to a part of it alone may beat that limit. *Plan* is the first
plan for this prompt. `transformers` is the model's own decoding over its own cache.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

import workbench as wb
from bench.end_to_end import eight_billion
from bench.measure import failures
from workbench.errors import BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.registry import registered
from workbench.runtime.plain_layers import device_weight

TOKENS, FEW = 32 << 10, 2 << 10
ANSWER = 256
WARM_S, LONGEST_S = 3.0, 4.0  # of an answer before, in which kernels compile, and of the one that counts

Row = dict[str, Any]


def rows(quick: bool) -> Iterator[Row]:
    """A row for transformers and one for each method; quick: a short prompt."""
    model = eight_billion()
    tokens = FEW if quick else TOKENS
    session, ids = read(model, tokens)
    yield plain(model, ids)
    last = reading()
    for key in [*(method.key for method in registered("kv") if method.key not in last), *last]:
        row: Row = {"what": key, "n": tokens}
        with failures(row):
            row |= answered(session, key)
        yield row
        gc.collect()
        torch.cuda.empty_cache()


def read(model: PreTrainedModel, tokens: int) -> tuple[wb.Session, torch.Tensor]:
    """A session whose model has read random tokens and never ends an answer by itself, and these tokens."""
    session = wb.Session((model, None))
    ids = torch.randint(3, 128000, (tokens,), generator=torch.Generator().manual_seed(0))
    session.read(ids)
    session.readings.facts = replace(session.facts, eos_ids=())
    return session, ids


def weight_nbytes(model: PreTrainedModel) -> int:
    """What a token reads: all weights but the embeddings of other tokens."""
    return sum(x.nbytes for x in model.parameters()) - device_weight(model).nbytes


def reading() -> list[str]:
    """The methods that read the prompt by themselves, in their own time."""
    methods = (method for method in registered("kv") if issubclass(method, KVMethod))
    return [method.key for method in methods if method.contributes("read")]


def answered(session: wb.Session, key: str) -> Row:
    """How fast a method answers; an answer that takes too long is stopped, and what came counts."""
    options: dict[str, Any] = {"budget": 0.25} if wb.method(key).takes_budget() else {}
    reads = key in reading()  # what takes long, and is done for every stream
    began = perf_counter()
    try:
        stream = session.stream(key, max_new_tokens=ANSWER, **options)
    except BudgetTooSmall as refusal:
        options, began = {"budget": refusal.smallest}, perf_counter()
        stream = session.stream(key, max_new_tokens=ANSWER, **options)
    torch.cuda.synchronize()
    row: Row = {"budget": options.get("budget", "own")}
    row["plan ms"] = 1e3 * (perf_counter() - began)
    if not reads:
        arrivals(stream, WARM_S)
        stream = session.stream(key, max_new_tokens=ANSWER, **options)
    times = arrivals(stream, LONGEST_S)
    half = len(times) // 2
    if half < 2:
        return {**row, "failed": f"{len(times)} tokens in {LONGEST_S} s"}
    row["us"] = 1e6 * (times[-1] - times[half]) / (len(times) - 1 - half)
    row["tokens/s"] = 1e6 / row["us"]
    row["first to last"] = (len(times) - 1) / (times[-1] - times[0])
    row["tokens"] = len(times)
    if not reads or len(times) == ANSWER:
        plan = stream.run.plan if len(times) == ANSWER else session.plan(key, **options)
        row["bytes"] = weight_nbytes(session.model) + plan.nbytes
    return row


def arrivals(stream: Any, longest_s: float) -> list[float]:
    """When the tokens of a stream came, until it ended or took too long; then it is cancelled."""
    began, times = perf_counter(), []
    for _ in stream:
        times.append(perf_counter())
        if times[-1] - began > longest_s:
            stream.cancel()
            break
    return times


@torch.inference_mode()
def plain(model: Any, ids: torch.Tensor) -> Row:
    """transformers' own decoding, over a cache that grows."""
    output = model(ids[None].cuda(), use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(32):
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        torch.cuda.synchronize()
        times.append(perf_counter())
    us = 1e6 * (times[-1] - times[8]) / (len(times) - 9)
    cache = sum(x.nbytes for layer in output.past_key_values.layers for x in (layer.keys, layer.values))
    return {
        "what": "transformers", "n": ids.numel(), "us": us, "tokens/s": 1e6 / us, "bytes": weight_nbytes(model) + cache,
    }  # fmt: skip
