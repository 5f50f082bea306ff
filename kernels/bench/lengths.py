"""The longest prompts, in a session: the shape of Llama 3.1 8B with random weights, its recording in host memory.

*Predicted* is said before: all weights, and what `workbench.cost` says lives beside them while the prompt goes through
a layer; *allocated* is the most that the device had while the prompt was read. Attention costs the square of the
length, so at full length the model has fewer layers (*layers*), each of them whole. An answer of 32 tokens under each
method, its first in the process; *us* is a token's time in it but for the first token, so with the kernels' compilation
and the capturing. Bounded readers take the prompt in without a recording.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from bench.measure import failures
from workbench.cost.memory import activation_nbytes
from workbench.cost.probe import architecture

CASES = ((4, 512_000), (32, 128_000))
LONGEST, LAYERS = 1_000_000, 4
ANSWER = 32
RECORDED = {"snapkv": 0.1, "keydiff": 0.1, "kivi": None}
BOUNDED = {"infllm": 0.02}

Row = dict[str, Any]


def rows(quick: bool) -> Iterator[Row]:
    """A row for each reading and each answer; quick: short prompts."""
    for layers, tokens in ((2, 4_096),) if quick else CASES:
        model = of_depth(layers, tokens)
        case = {"layers": layers, "n": tokens}
        session = wb.Session((model, None), keep_trace_on="cpu")
        yield {"what": "read", **case, **read(session, ids(tokens))}
        session.readings.facts = replace(session.facts, eos_ids=())
        for key, budget in RECORDED.items():
            row = {"what": key, **case}
            with failures(row):
                row |= answered(session, key, budget)
            yield row
        del session, model
        freed()
    layers, tokens = (2, 8_192) if quick else (LAYERS, LONGEST)
    model = of_depth(layers, tokens)
    session = wb.Session((model, None))
    session.read(ids(tokens), record=False)
    session.readings.facts = replace(session.facts, eos_ids=())
    for key, budget in BOUNDED.items():
        row = {"what": key, "layers": layers, "n": tokens}
        with failures(row):
            row |= answered(session, key, budget)
        yield row


def of_depth(layers: int, tokens: int) -> PreTrainedModel:
    """The shapes of Llama 3.1 8B with so many layers, which may read so many tokens."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=tokens + 1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model: PreTrainedModel = LlamaForCausalLM(config).eval()
            return model
    finally:
        torch.set_default_dtype(before)


def ids(tokens: int) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 128000, (tokens,), generator=torch.Generator().manual_seed(0))


def read(session: wb.Session, prompt: torch.Tensor) -> Row:
    """What reading took, and what was said before that it would."""
    session.read(prompt[:64])  # what is checked of a model the first time
    shape = architecture(session.model.config, session.facts.name, torch.bfloat16)
    weights = torch.cuda.memory_allocated()
    predicted = weights + activation_nbytes(shape, prompt.numel())
    torch.cuda.reset_peak_memory_stats()
    began = perf_counter()
    trace = session.read(prompt)
    torch.cuda.synchronize()
    seconds, peak = perf_counter() - began, torch.cuda.max_memory_allocated()
    return {
        "seconds": round(seconds, 1),
        "bytes": trace.nbytes,
        "allocated": peak,
        "predicted": predicted,
        "off": predicted / peak - 1,
    }


def answered(session: wb.Session, key: str, budget: float | None) -> Row:
    """An answer under a method: its plan, its tokens, and the most that was allocated."""
    torch.cuda.reset_peak_memory_stats()
    began = perf_counter()
    session.plan(key, budget=budget)
    torch.cuda.synchronize()
    planned = perf_counter() - began
    stream = session.stream(key, budget=budget, max_new_tokens=ANSWER)
    times = [perf_counter() for _ in stream]
    steps = len(times) - 1
    row = {"plan ms": planned * 1e3, "allocated": torch.cuda.max_memory_allocated()}
    stream.run.release()
    session.runs.clear()
    freed()
    return row | {"us": (times[-1] - times[0]) / steps * 1e6}


def freed() -> None:
    """Give back what nothing holds."""
    gc.collect()
    torch.cuda.empty_cache()
