"""Bytes of an estimate are those of real caches, weights and activations, of every kind of architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from benchmarks.model_kinds import config_of, tiny_of
from workbench.cost.memory import activation_nbytes
from workbench.cost.probe import architecture
from workbench.errors import NotApplicable
from workbench.kv.plan import uncompressed_nbytes
from workbench.measure.memory import LiveBytes, tensor_bytes
from workbench.registry import registered

N = 43
PLAIN = ["bart", "bloom", "dbrx", "gpt2", "gpt_bigcode", "llama", "qwen3", "whisper"]
EXPERTS = ["mixtral", "qwen3_moe"]
SLIDING = ["cohere2", "gemma2", "gemma3_text", "gpt_oss", "mistral", "olmo3", "phi3"]
LATENT = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minicpm3", "kimi_linear", "bailing_hybrid"]
HYBRID = [
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_next",
    "zamba", "zamba2",
]  # fmt: skip
SHARING = ["gemma3n_text", "gemma4_text"]
KINDS = PLAIN + EXPERTS + SLIDING + LATENT + HYBRID + SHARING


def live(model: Any, tokens: int) -> tuple[int, int]:
    """Bytes of keys and values, and of all else, that transformers' own cache holds after so many tokens."""
    with torch.inference_mode():
        cache = model(torch.full((1, tokens), 5), use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    kv = sum(tensor.nbytes for tensor in held if tensor is not None)
    return kv, sum(tensor.nbytes for keeper in (cache, *cache.layers) for tensor in states(keeper))


def states(keeper: Any) -> Iterator[Tensor]:
    for name, value in vars(keeper).items():
        if name.startswith("_") or name in ("keys", "values", "layers"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        yield from (each for each in values if isinstance(each, Tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_models_own_cache(kind: str) -> None:
    model, shape = tiny_of(kind), architecture(config_of(kind), kind, torch.float32)
    # transformers' sliding layers hold one position less than the window: the next token brings its own.
    less = sum(layer.entry * 4 for layer in shape.layers if layer.entry and layer.window and layer.window <= N)
    assert (shape.kv_nbytes(N, torch.float32) - less, shape.state_nbytes(N)) == live(model, N)
    assert shape.weight_nbytes == tensor_bytes(model.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "deepseek_v3", "gemma3n_text", "gpt_oss", "jamba", "llama4_text"])
def test_bytes_are_those_that_the_session_counts(kind: str) -> None:
    session = wb.Session((tiny_of(kind), None), kv_dtype="float32")
    trace = session.read(torch.full((N,), 5))
    shape = architecture(config_of(kind), kind, torch.float32)
    blank = shape.trace(N, torch.float32)
    assert uncompressed_nbytes(blank, torch.float32) == uncompressed_nbytes(trace, torch.float32)
    assert shape.kv_nbytes(N, torch.float32) == uncompressed_nbytes(trace, torch.float32)
    assert blank.exact == trace.exact and blank.numbers == trace.numbers
    assert shape.state_nbytes(N) == (trace.states.nbytes if trace.states else 0)


def test_latent_attention_holds_a_latent_and_a_rotated_key() -> None:
    found = wb.cost(config_of("deepseek_v3"), context=N, dtype="float32")
    shape = found.architecture
    assert shape.latent_nbytes(N, torch.float32) == 4 * N * (32 + 8) * 4  # layers, tokens, r + d_r, bytes
    assert found.memory.kv in (shape.latent_nbytes(N, torch.float32), shape.heads_nbytes(N, torch.float32))
    assert any("latent attention" in note for note in found.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_counts_in_its_own_precision(dtype: str) -> None:
    found = wb.cost("workbench-tiny", context=100, batch=3, kv_dtype=dtype)
    layers, numbers = (
        found.architecture.facts.layers,
        2 * found.architecture.facts.kv_heads * found.architecture.facts.head_dim,
    )
    assert found.memory.kv == 3 * layers * numbers * 100 * getattr(torch, dtype).itemsize


@pytest.mark.parametrize("kind", ["deepseek_v4", "bert", "reformer"])
def test_what_cannot_be_told_is_refused_in_one_line(kind: str) -> None:
    with pytest.raises(NotApplicable) as refusal:
        wb.cost(config_of(kind), context=N)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 300, "num_attention_heads": 16, "head_dim": 64}])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_activations_are_within_three_percent_of_live_ones(kind: str, sizes: dict[str, int]) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    common = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8}
    own = {"n_embd": 256, "n_head": 8, "n_layer": 2} if kind == "gpt2" else common | {"num_key_value_heads": 2} | sizes
    config = CONFIG_MAPPING[kind](vocab_size=256, **own)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shape, tokens = architecture(config, kind, torch.bfloat16), 700
    with torch.inference_mode(), LiveBytes() as live_bytes:
        model(torch.full((1, tokens), 5), use_cache=True, logits_to_keep=1)
        peak = live_bytes.peak
    want = peak - shape.kv_nbytes(tokens, torch.bfloat16)
    assert activation_nbytes(shape, tokens) == pytest.approx(want, rel=0.03)


# -- recipes


@pytest.fixture(scope="module")
def session() -> wb.Session:
    made = wb.Session("workbench-tiny", kv_dtype="float32")
    made.read("The quick brown fox jumps over the lazy dog. " * 20)
    return made


@pytest.fixture(scope="module")
def latent() -> wb.Session:
    made = wb.Session((tiny_of("deepseek_v3"), None), kv_dtype="float32")
    made.read(torch.randint(3, 250, (200,), generator=torch.Generator().manual_seed(1)))
    return made


READING = {cls.key for cls in registered("kv") if "read" in cls.supplied}


@pytest.mark.parametrize("key", [cls.key for cls in registered("kv") if cls.key not in READING])
def test_a_cache_under_a_recipe_is_what_planning_holds(session: wb.Session, key: str) -> None:
    assert session.trace is not None
    tokens = session.trace.tokens
    budget = 0.7 if wb.method(key).takes_budget() else None
    try:
        told = wb.cost("workbench-tiny", key, context=tokens, budget=budget, dtype="float32")
    except NotApplicable as refusal:
        assert "\n" not in str(refusal)
        return
    plan = session.plan(key, budget=budget)
    if any("upper bound" in note for note in told.notes):
        assert plan.nbytes <= told.memory.kv <= told.memory.full_kv
    else:
        assert (told.memory.kv, told.memory.host) == (plan.nbytes, plan.host_nbytes)


@pytest.mark.parametrize("key", ["full", "snapkv", "kivi", "streaming-llm", "adakv", "look-m"])
def test_a_cache_of_latent_rows_under_a_recipe_is_what_planning_holds(latent: wb.Session, key: str) -> None:
    budget = {"snapkv": 0.5, "streaming-llm": 0.5}.get(key)
    told = wb.cost(config_of("deepseek_v3"), key, context=200, budget=budget, dtype="float32")
    plan = latent.plan(key, budget=budget)
    assert told.memory.full_kv == plan.full_nbytes == 4 * 200 * (32 + 8) * 4
    bounded = any("upper bound" in note for note in told.notes)
    assert plan.nbytes <= told.memory.kv if bounded else plan.nbytes == told.memory.kv
    assert any("in place of latent rows" in note for note in told.notes) == (plan.expanded is not None)


def test_two_cache_methods_together_are_what_planning_holds(session: wb.Session) -> None:
    assert session.trace is not None
    recipe = [wb.method("snapkv", budget=0.5), wb.method("kivi", bits=4)]
    told = wb.cost("workbench-tiny", recipe, context=session.trace.tokens, dtype="float32")
    assert told.memory.kv == session.plan(recipe).nbytes


def test_a_method_that_reads_keeps_to_its_budget(session: wb.Session) -> None:
    assert session.trace is not None
    told = wb.cost("workbench-tiny", "infllm", context=session.trace.tokens, budget=0.5, dtype="float32")
    assert session.plan("infllm", budget=0.5).nbytes <= told.memory.kv == told.memory.full_kv // 2
    assert told.memory.reading_kv == told.memory.kv  # the prompt never lies there whole


@pytest.mark.parametrize("key", [cls.key for cls in registered("weights")])
def test_weights_under_a_method_are_what_it_foretells(session: wb.Session, key: str) -> None:
    method: Any = wb.method(key)
    try:
        survey = method.survey(session.model)
        survey.check()
        want = tensor_bytes(session.model.parameters()) + survey.nbytes
        want -= sum(linear.weight.nbytes for linear in survey.linears.values())
    except NotApplicable:
        want = None
    try:
        told = wb.cost("workbench-tiny", key, context=100, dtype="float32").memory.weights
    except NotApplicable as refusal:
        assert "\n" not in str(refusal)
        assert want is None or "looks at the weights" in str(refusal)
        return
    assert told == want


@pytest.mark.parametrize("keys", [["rtn"], ["quarot", "rtn"], ["activations", "rtn"]])
def test_weights_are_as_many_bytes_as_the_compressed_model_holds(session: wb.Session, keys: list[str]) -> None:
    from workbench.weights import compressed

    twin = compressed(session.model, [wb.method(key) for key in keys])
    told = wb.cost("workbench-tiny", keys, context=100, dtype="float32")
    live = tensor_bytes([*twin.parameters(), *twin.buffers()]) - tensor_bytes(session.model.buffers())
    folded = 2e-3 if "quarot" in keys else 1e-6  # norms that it folds into matrices are counted as they were
    assert live <= told.memory.weights <= live * (1 + folded)
    assert any("left alone" in note for note in told.notes)
