"""Entries that stand by their place in the cache, against a Llama written out in plain loops."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import trace_of
from tests.readings import decoder_of, ids_of, session_on
from workbench.errors import BadRecipe, NotApplicable, PromptTooLong
from workbench.kv import Knorm, SnapKV, StreamingLLM
from workbench.kv.base import KVMethod
from workbench.kv.stores.closed_up import ClosedUpStore, places
from workbench.runtime.planning import make_plan

TOLERANCE = 1e-4


class ClosedUp(KVMethod):
    """Close up what any scorer leaves, as key rerotation does (FINCH, KVPress)."""

    key = "closed-up"

    @property
    def closes_up(self) -> bool:
        return True


class PlainLlama:
    """One token after another: each layer holds keys before rotary embedding, and turns all of them to their places."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.width = self.config.head_dim
        self.held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.model.model.layers]

    def turned(self, x: Tensor, place: int) -> Tensor:
        """x [heads, d] at a place: channel i turns with channel i + d / 2."""
        half = self.width // 2
        base = self.config.rope_parameters["rope_theta"]
        out = torch.empty_like(x)
        for i in range(half):
            angle = torch.tensor(place * base ** (-2 * i / self.width), dtype=torch.float64)
            cos, sin = float(angle.cos()), float(angle.sin())
            out[:, i] = x[:, i] * cos - x[:, i + half] * sin
            out[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
        return out

    def read(self, token: int) -> Tensor:
        """The logits [v] after a token, which is held from now on."""
        core = self.model.model
        x = core.embed_tokens.weight[token]
        for layer, held in zip(core.layers, self.held, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            query, key, value = (
                (side(normed)).view(-1, self.width) for side in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            held.append((key, value))
            here, groups = len(held) - 1, len(query) // len(key)
            asked, outs = self.turned(query, here), []
            keys = [self.turned(other, place) for place, (other, _) in enumerate(held)]
            for head in range(len(query)):
                scores = torch.stack([asked[head] @ other[head // groups] for other in keys]) * self.width**-0.5
                weights = scores.softmax(dim=0)
                outs.append(sum(w * v[head // groups] for w, (_, v) in zip(weights, held, strict=True)))
            x = x + attention.o_proj(torch.cat(outs))
            normed = layer.post_attention_layernorm(x)
            x = x + layer.mlp.down_proj(silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
        return self.model.lm_head(core.norm(x))

    def keep(self, chosen: list[int]) -> None:
        self.held = [[held[place] for place in chosen] for held in self.held]


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_streaming_llm_counts_positions_within_the_cache_as_published(tiny_llama: PreTrainedModel, sinks: int) -> None:
    prompt, rest = ids_of(24, 0), ids_of(30, 1)
    session = session_on(tiny_llama, prompt, kv_dtype="float32")
    plan = session.plan("streaming-llm", budget="12 tokens", sinks=sinks)
    decoder, plain = decoder_of(session.model, plan), PlainLlama(tiny_llama)
    with torch.inference_mode():
        for token in prompt.tolist():
            plain.read(token)
        plain.keep([*range(sinks), *range(24 - 12 + sinks, 24)])
        for token in rest.tolist():
            plain.keep([*range(sinks), *range(sinks + 1, 12)])
            want = plain.read(token)
            got = decoder.feed(torch.tensor([token]))[0]
            assert (got - want).abs().max() < TOLERANCE
    true = decoder_of(session.model, session.plan("streaming-llm", budget="12 tokens", sinks=sinks, positions="text"))
    assert sinks == 0 or (torch.cat([true.feed(t[None]) for t in rest])[-1] - want).abs().max() > 0.01


def test_several_tokens_at_once_stand_as_they_would_one_by_one(tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(40, 0), kv_dtype="float32")
    plan = session.plan("streaming-llm", budget=0.5)
    whole, single = decoder_of(session.model, plan), decoder_of(session.model, plan)
    for decoder in (whole, single):  # room for what comes, so that the same is held all the time
        for store in decoder.stores:
            assert store.evictable is not None
            store.evictable.evict(torch.arange(5, 11).expand(2, -1))
    question = ids_of(6, 2)
    got, want = whole.feed(question, logits=6), torch.cat([single.feed(token[None]) for token in question])
    assert (got - want).abs().max() < TOLERANCE


@pytest.mark.parametrize("recipe", [("snapkv",), ("snapkv", "adakv"), ("knorm", "turbomind"), ("snapkv", "kivi")])
def test_what_any_scorer_leaves_closes_up_whatever_stores_it(recipe: tuple[str, ...]) -> None:
    trace = trace_of(tokens=60)
    methods = [wb.method(key, **({"window": 8} if key in ("snapkv", "adakv") else {})) for key in recipe]
    methods = [method.with_budget(0.6) if index == 0 else method for index, method in enumerate(methods)]
    plan = make_plan(trace, [*methods, ClosedUp()], torch.float32)
    apart = make_plan(trace, methods, torch.float32)
    assert plan.nbytes == apart.nbytes == sum(store.nbytes for store in plan.stores())
    for layer, store, other in zip(trace.layers, plan.stores(), apart.stores(), strict=True):
        got, true = store.contents(torch.float32), other.contents(torch.float32)
        for head in range(layer.kv_heads):
            real = slice(None) if true.valid is None else true.valid[head]
            where = true.positions.expand(layer.kv_heads, -1)[head][real]
            order = sorted(range(len(where)), key=lambda slot: int(where[slot]))
            moved = torch.tensor([order.index(slot) for slot in range(len(where))])
            unturned = layer.rotation.undo(true.keys[head][real], where)
            assert torch.allclose(got.keys[head][real], layer.rotation.apply(unturned, moved), atol=1e-5)


def test_queries_stand_behind_what_their_head_holds() -> None:
    trace = trace_of(tokens=60)
    plan = make_plan(trace, [SnapKV(window=8, budget=0.4), wb.method("adakv", window=8), ClosedUp()], torch.float32)
    layer, store = trace.layers[1], plan.stores()[1]
    asked = torch.tensor([54, 57, 59])
    query = layer.queries[:, asked]
    got, weights = store.attend(query, asked, layer.scoring, weights=True)
    assert weights is not None
    held = store.contents(torch.float32)
    for head in range(layer.heads):
        group = head // layer.groups
        real = torch.ones(held.keys.shape[1], dtype=torch.bool) if held.valid is None else held.valid[group]
        for index, position in enumerate(asked.tolist()):
            where = held.positions[group]
            place = sum(bool(ok) and int(p) < position for p, ok in zip(where, real, strict=True))
            plain = layer.rotation.undo(query[head, index : index + 1], torch.tensor([position]))
            turned = layer.rotation.apply(plain, torch.tensor([place]))[0]
            sees = real & (where <= position)
            scores = (held.keys[group] @ turned * layer.scale).masked_fill(~sees, -torch.inf)
            assert torch.allclose(scores.softmax(0) @ held.values[group], got[head, index], atol=1e-5)


def test_places_count_only_what_is_there() -> None:
    positions = torch.tensor([[7, 2, 9, 0], [5, 1, 0, 0]], dtype=torch.int32)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert places(positions, None)[0].tolist() == [2, 1, 3, 0]
    assert places(positions, valid)[1, :2].tolist() == [1, 0]


def test_a_run_goes_on_beyond_the_models_positions() -> None:
    session = wb.Session("workbench-tiny")
    most = session.facts.max_positions
    session.read(torch.randint(1, 8000, (most - 8,), generator=torch.Generator().manual_seed(0)))
    run = session.run("streaming-llm", budget="64 tokens", question=[5, 6, 7], max_new_tokens=12)
    for turn in range(2):
        run = run.ask([8 + turn] * 40, max_new_tokens=4)
    assert run.decoder is not None
    assert run.decoder.position > most
    assert run.plan.endless
    assert run.kv_nbytes <= run.plan.nbytes
    for positions in ("text", "cache"):
        budget = "64 tokens" if positions == "text" else 1.0
        with pytest.raises(PromptTooLong):
            session.run("streaming-llm", budget=budget, positions=positions, question=[5] * 9, max_new_tokens=1)
    with pytest.raises(PromptTooLong, match="compared"):
        run.measure()


def test_what_cannot_be_turned_is_refused() -> None:
    trace = trace_of(tokens=60)
    for other in ("mikv", "kcache"):
        with pytest.raises(BadRecipe, match=other):
            make_plan(trace, [Knorm(budget=0.5), wb.method(other), ClosedUp()], torch.float32)
    with pytest.raises(BadRecipe, match="a2ats"):
        make_plan(trace, [wb.method("a2ats", budget=0.5), ClosedUp()], torch.float32)


def test_a_closed_up_store_is_attended_to_by_nothing_else(tiny_llama: PreTrainedModel) -> None:
    plan = make_plan(trace_of(), [StreamingLLM(budget=0.5)], torch.float32, model=tiny_llama)
    assert all(isinstance(store, ClosedUpStore) and store.attends_itself for store in plan.stores())
    assert not any(
        isinstance(store, ClosedUpStore)
        for store in make_plan(trace_of(), [StreamingLLM(budget=1.0)], torch.float32).stores()
    )


def test_where_keys_are_not_turned_by_position_it_says_so(tiny_llama: PreTrainedModel) -> None:
    trace = trace_of(tokens=40)
    other = replace(trace, layers=tuple(replace(layer, rotary=None) for layer in trace.layers))
    with pytest.raises(NotApplicable, match="turned"):
        make_plan(other, [StreamingLLM(budget=0.5)], torch.float32, model=tiny_llama)


def test_text_beyond_the_models_positions_is_as_likely_as_before(tiny_session: wb.Session) -> None:
    # benchmarks/streaming.py reads 100,000 tokens.
    session = wb.Session((tiny_session.model, tiny_session.tokenizer), kv_dtype="float32")
    assert session.tokenizer is not None
    ids = torch.tensor(session.tokenizer(Path(argparse.__file__).read_text(encoding="utf-8"))["input_ids"][:3072])
    session.read(ids[:512])
    nats = {}
    for name, plan in {
        "closed up": session.plan("streaming-llm", budget="256 tokens"),
        "whole": session.plan("full"),
    }.items():
        decoder, given = decoder_of(session.model, plan), [plan.logits[None]]
        for part in ids[512:].split(64):
            given.append(decoder.feed(part, logits=part.numel()))
            where, valid = decoder.stores[0].slots()
            if name == "closed up":
                assert int(places(where, valid).max()) < 256
                assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes
        nats[name] = cross_entropy(torch.cat(given)[:-1], ids[512:], reduction="none")
        assert decoder.position == 3072 > session.facts.max_positions
    before, beyond = nats["closed up"][:1536].mean(), nats["closed up"][-512:].mean()
    assert beyond < before + 0.5
    assert nats["whole"][-512:].mean() > beyond + 0.4
    assert nats["whole"][:1536].mean() < before + 0.1  # within them it is as good
