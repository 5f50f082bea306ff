"""Decoding on stores: exact when nothing is dropped, else true positions; bytes within the plan at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import workbench as wb
from tests.readings import decoder_of, ids_of, session_on
from workbench.models import TINY_ARCHITECTURES
from workbench.registry import registered

ModelOf = Callable[[str], PreTrainedModel]
EVICTING = [cls.key for cls in registered("kv") if "decode" in cls.model_fields and not cls.grows]
TOLERANCE = 1e-4


def plain_logits(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(sequence[None]).logits[0]


def masked_logits(
    model: PreTrainedModel,
    prompt: Tensor,
    parts: Sequence[Tensor],
    hidden: Callable[[int, Tensor, Tensor], Tensor | None],
) -> Tensor:
    """Logits of plain transformers with its full cache, eager attention and masks that hide evicted entries.

    hidden(layer, queries [q], slots [m]) gives bool [h or 1, q, m], or None to leave that layer's own mask alone. The
    slots of a full cache are its positions.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    rows = []
    try:
        with ExitStack() as stack, torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(prompt[None], past_key_values=cache)
            end = prompt.numel()

            def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                queries = torch.arange(end, end + size)
                slots = torch.arange(end + size)
                out = hidden(module.layer_idx, queries, slots)
                if out is None:
                    return args, kwargs
                out = out | (slots > queries[:, None])
                mask = torch.zeros(out.shape).masked_fill(out, torch.finfo(torch.float32).min)
                return args, {**kwargs, "attention_mask": mask[None]}

            for layer in model.model.layers:
                handle = layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            for part in parts:
                size = part.numel()
                rows.append(model(part[None], past_key_values=cache).logits[0])
                end += size
    finally:
        model.set_attn_implementation(before)
    return torch.cat(rows)


# --- nothing dropped


@pytest.mark.parametrize("length", [1, 2, 17, 60, 200])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_full_float32_cache_gives_plain_logits(architecture: str, length: int, tiny_model: ModelOf) -> None:
    model = tiny_model(architecture)
    prompt, question, answer = ids_of(length, 0), ids_of(7, 1), ids_of(5, 2)
    want = plain_logits(model, torch.cat([prompt, question, answer]))
    session = session_on(model, prompt, kv_dtype="float32")
    assert session.trace is not None
    assert (session.trace.logits - want[length - 1]).abs().max() < TOLERANCE

    with_question = decoder_of(session.model, session.plan("full"))
    got = torch.cat([with_question.feed(question, logits=7), *[with_question.feed(t[None]) for t in answer]])
    assert (got - want[length:]).abs().max() < TOLERANCE

    one_by_one = decoder_of(session.model, session.plan("full"))
    got = torch.cat([one_by_one.feed(t[None]) for t in question])
    assert (got - want[length : length + 7]).abs().max() < TOLERANCE


@pytest.mark.parametrize("key", [cls.key for cls in registered("kv") if cls.takes_budget()])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_budget_one_is_exact_for_every_method(architecture: str, key: str, tiny_model: ModelOf) -> None:
    model, prompt, question = tiny_model(architecture), ids_of(60, 0), ids_of(7, 1)
    session = session_on(model, prompt, kv_dtype="float32")
    plan = session.plan(key, budget=1.0)
    got = decoder_of(session.model, plan).feed(question, logits=7)
    assert (got - plain_logits(model, torch.cat([prompt, question]))[60:]).abs().max() < TOLERANCE
    assert plan.error.max() <= 1e-3


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
@pytest.mark.parametrize("asked", [0, 7])
def test_run_full_equals_generate(architecture: str, asked: int, tiny_model: ModelOf) -> None:
    model, prompt = tiny_model(architecture), ids_of(30, 0)
    question = ids_of(asked, 1) if asked else None
    run = session_on(model, prompt, kv_dtype="float32").run("full", question=question, max_new_tokens=24)
    sequence = prompt if question is None else torch.cat([prompt, question])
    made = model.generate(
        sequence[None], attention_mask=torch.ones(1, sequence.numel()), max_new_tokens=24, do_sample=False
    )
    assert run.tokens == tuple(made[0, sequence.numel() :].tolist())
    assert torch.equal(run.prompt_ids, sequence)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_sixteen_bits_stay_close_to_exact(architecture: str, tiny_model: ModelOf) -> None:
    model, prompt, question = tiny_model(architecture), ids_of(60, 0), ids_of(7, 1)
    session = wb.Session((model, None))
    session.read(prompt)
    assert session.kv_dtype == torch.bfloat16  # a checkpoint of 32 bits says nothing about deployment
    got = decoder_of(session.model, session.plan("full")).feed(question, logits=7)
    want = plain_logits(model, torch.cat([prompt, question]))[60:]
    assert 0 < (got - want).norm() / want.norm() < 0.1


@pytest.mark.parametrize("length", [3, 15, 16, 17, 40])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_sliding_windows_are_exact_on_both_sides_of_the_window(  # trap 13
    architecture: str, length: int, tiny_model: ModelOf
) -> None:
    model, prompt, rest = tiny_model(architecture), ids_of(length, 0), ids_of(40, 1)
    session = session_on(model, prompt, kv_dtype="float32")
    decoder = decoder_of(session.model, session.plan("full"))
    got = torch.cat([decoder.feed(rest[:5], logits=5), *[decoder.feed(t[None]) for t in rest[5:]]])
    assert (got - plain_logits(model, torch.cat([prompt, rest]))[length:]).abs().max() < TOLERANCE
    for layer in session.trace.layers if session.trace else ():
        if layer.window is not None:
            held = decoder.stores[layer.index].positions
            assert all(positions.tolist() == list(range(length + 40 - 16, length + 40)) for positions in held)


# --- something dropped


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "mqa"])
@pytest.mark.parametrize(
    "recipe",
    [
        ("snapkv", {"budget": 0.3, "window": 4}),
        ("adakv", {"budget": 0.3, "window": 4}),  # every head another length
        ("pyramidkv", {"budget": 0.3, "window": 4}),  # every layer another length
        ("h2o", {"budget": 0.3, "decode": False}),
    ],
    ids=lambda recipe: recipe[0],
)
def test_after_eviction_tokens_keep_their_true_positions(  # traps 8, 9, 11, 12
    architecture: str, recipe: tuple[str, dict[str, Any]], tiny_model: ModelOf
) -> None:
    model, prompt, question, answer = tiny_model(architecture), ids_of(100, 0), ids_of(6, 1), ids_of(4, 2)
    session = session_on(model, prompt, kv_dtype="float32")
    key, parameters = recipe
    plan = session.plan(key, **parameters)
    groups = session.facts.group
    assert any(plan.kept(layer.index, 0).numel() < 100 for layer in plan.trace.compressible)

    def hidden(layer: int, queries: Tensor, slots: Tensor) -> Tensor | None:
        if layer in plan.exact:
            return None
        out = torch.zeros(session.facts.heads, queries.numel(), slots.numel(), dtype=torch.bool)
        for head in range(session.facts.heads):
            out[head, :, :100] = True
            out[head][:, plan.kept(layer, head // groups)] = False
        return out

    decoder = decoder_of(session.model, plan)
    got = torch.cat([decoder.feed(question, logits=6), *[decoder.feed(t[None]) for t in answer]])
    want = masked_logits(model, prompt, [question, *answer[:, None]], hidden)
    assert (got - want).abs().max() < TOLERANCE
    assert (want - plain_logits(model, torch.cat([prompt, question, answer]))[100:]).abs().max() > 0.01


def test_streaming_llm_rolls_over_true_positions_where_asked(tiny_llama: PreTrainedModel) -> None:  # traps 7, 8, 9
    prompt, rest = ids_of(50, 0), ids_of(60, 1)
    session = session_on(tiny_llama, prompt, kv_dtype="float32")
    plan = session.plan("streaming-llm", budget=0.4, positions="text")
    capacity = plan.kept(0, 0).numel()

    def hidden(layer: int, queries: Tensor, slots: Tensor) -> Tensor:
        recent = slots > queries[:, None] - (capacity - 4)
        return ~((slots < 4) | recent)[None]

    decoder = decoder_of(session.model, plan)
    got = torch.cat([decoder.feed(token[None]) for token in rest])
    want = masked_logits(tiny_llama, prompt, rest[:, None].unbind(), hidden)
    assert (got - want).abs().max() < TOLERANCE


def test_sinks_survive_hundreds_of_decode_steps(tiny_llama: PreTrainedModel) -> None:  # trap 7
    session = session_on(tiny_llama, ids_of(64, 0), kv_dtype="float32")
    plan = session.plan("streaming-llm", budget=0.5)
    capacity = plan.kept(0, 0).numel()
    decoder = decoder_of(session.model, plan)
    for token in ids_of(300, 1):
        decoder.feed(token[None])
    expected = [0, 1, 2, 3, *range(364 - capacity + 4, 364)]
    for store in decoder.stores:
        assert [positions.tolist() for positions in store.positions] == [expected, expected]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", [*EVICTING, "h2o+adakv"])
def test_evicting_methods_hold_their_bytes_at_every_step(recipe: str, architecture: str, tiny_model: ModelOf) -> None:
    session = wb.Session((tiny_model(architecture), None))
    session.read(ids_of(80, 0))
    methods = ["h2o", "adakv"] if "+" in recipe else recipe
    plan = session.plan(methods, budget=0.5)
    decoder = decoder_of(session.model, plan)
    before = [set(positions.tolist()) for positions in decoder.stores[1].positions]
    for step, token in enumerate(ids_of(210, 3)):
        decoder.feed(token[None])
        assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes, f"step {step}"
        after = [set(positions.tolist()) for positions in decoder.stores[1].positions]
        for old, new in zip(before, after, strict=True):
            assert new - old == {80 + step}  # what left never comes back
        before = after


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", [*EVICTING, "h2o+adakv"])
def test_a_question_longer_than_the_cache_enters_in_parts(recipe: str, architecture: str, tiny_model: ModelOf) -> None:
    session = wb.Session((tiny_model(architecture), None))
    session.read(ids_of(80, 0))
    methods = ["h2o", "adakv"] if "+" in recipe else recipe
    run = session.run(methods, budget=0.4, question=ids_of(150, 4), max_new_tokens=4)
    assert len(run.tokens) == 4
    assert run.kv_nbytes <= run.plan.nbytes
    newest = 80 + 150 + 3 - 1
    assert run.decoder is not None
    for store in run.decoder.stores:
        assert all(int(positions[-1]) == newest for positions in store.positions)


@pytest.mark.parametrize("key", EVICTING)
def test_a_question_in_parts_fills_the_same_cache_as_token_by_token(key: str, tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(80, 0), kv_dtype="float32")
    plan = session.plan(key, budget=0.5)
    whole, single = decoder_of(session.model, plan), decoder_of(session.model, plan)
    question = ids_of(90, 4)
    whole.feed(question)
    for token in question:
        single.feed(token[None])
    for a, b in zip(whole.stores, single.stores, strict=True):
        assert [p.numel() for p in a.positions] == [p.numel() for p in b.positions]
        if key == "streaming-llm":
            assert all(torch.equal(x, y) for x, y in zip(a.positions, b.positions, strict=True))


def test_a_copy_goes_its_own_way(tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(80, 0), kv_dtype="float32")
    for recipe, budget in (("h2o", 0.5), ("adakv", 0.5), ("kivi", 0.4), ("mikv", 0.5), ("full", None)):
        decoder = decoder_of(session.model, session.plan(recipe, budget=budget))
        decoder.reserve(64)
        decoder.feed(ids_of(3, 7))
        twin = decoder.clone()
        twin.feed(ids_of(40, 8))
        held = [positions.clone() for positions in decoder.stores[0].positions]
        again = decoder.clone()
        assert torch.equal(decoder.feed(ids_of(5, 9), logits=5), again.feed(ids_of(5, 9), logits=5)), recipe
        assert all(int(p[-1]) == 82 for p in held), recipe
