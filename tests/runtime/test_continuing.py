"""Layers that keep another state than keys and values: exact, copied, counted apart, and carried on."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import tiny_of
from workbench.engine.attention_hook import forward
from workbench.engine.states import attending
from workbench.errors import BadParameter, NotApplicable
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.models.depth import numbers_in, origins
from workbench.models.quiet import quiet
from workbench.runtime.continuing import fresh_states
from workbench.runtime.cuda_graph import refusal
from workbench.weights.surgery.depth import shorten

# Beside layers with attention: gated delta nets; convolutions; Mamba whose code forgets it; Mamba in the same layers.
KINDS = {"qwen3_next": (3,), "lfm2": (1, 3), "jamba": (1, 3), "falcon_h1": (0, 1, 2, 3)}
IDS = torch.randint(3, 250, (45,), generator=torch.Generator().manual_seed(0))
READ = 40


@cache
def model(kind: str) -> PreTrainedModel:
    return tiny_of(kind)


@cache
def read(kind: str) -> wb.Session:
    session = wb.Session((model(kind), None), kv_dtype="float32")
    session.read(IDS[:READ])
    return session


def generated(kind: str, ids: Tensor, count: int) -> tuple[int, ...]:
    with torch.inference_mode(), quiet():
        made = model(kind).generate(ids[None], max_new_tokens=count, do_sample=False)
    return tuple(made[0, ids.numel() :].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_transformers_each_time_and_in_steps_of_any_size(kind: str) -> None:
    session, want = read(kind), generated(kind, IDS, 4)
    run = session.run(question=IDS[READ:], max_new_tokens=4)  # the question is read at once
    assert run.tokens == want
    one = session.run(question=IDS[READ : READ + 1], max_new_tokens=1)
    decoder = one.decoder
    assert decoder is not None
    for steps in ((4,), (1, 1, 2), (4,)):  # from copies of the same place
        copy = decoder.clone()
        rows = [copy.feed(part) for part in IDS[READ + 1 :].split(list(steps))]
        assert int(rows[-1][-1].argmax()) == want[0]
    assert run.ask(IDS[:3]).tokens == run.ask(IDS[:3]).tokens
    assert session.run(question=IDS[READ:], max_new_tokens=4).tokens == want


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_counted_apart_and_are_the_same_under_every_recipe(kind: str) -> None:
    with torch.inference_mode(), quiet():
        own = model(kind)(input_ids=IDS[None, :READ], use_cache=True).past_key_values
    kept = [
        x
        for layer in own.layers
        for name in ("conv_states", "recurrent_states")
        for x in getattr(layer, name, {}).values()
    ]
    nbytes = sum(x.nbytes for x in kept if x is not None)
    cached = sum(
        x.nbytes
        for layer in own.layers
        for x in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if x is not None
    )
    assert nbytes > 0
    session = read(kind)
    full, half = (session.run(spec, max_new_tokens=2) for spec in ("full", SnapKV(budget=0.5)))
    for run in (full, half):
        assert run.memory.samples[-1].categories["state"] == run.plan.state_nbytes == nbytes
    assert full.plan.nbytes == full.plan.full_nbytes == cached
    assert half.plan.nbytes <= 0.5 * cached
    assert session.run("kivi", bits=2, group=8, residual=8, max_new_tokens=2).plan.nbytes < cached
    assert session.memory.peaks["state"] == nbytes


@pytest.mark.parametrize(("kind", "numbers"), KINDS.items())
def test_layers_are_called_as_the_model_calls_them(kind: str, numbers: tuple[int, ...]) -> None:
    session = read(kind)
    run = session.run(SnapKV(budget=0.5), max_new_tokens=2)
    assert session.trace is not None
    assert session.trace.numbers == tuple(sorted(set(session.heads().layer))) == numbers == attending(model(kind))
    assert tuple(sorted(set(run.memory.by_layer().layer) - {0})) == tuple(n for n in numbers if n)
    assert tuple(sorted(set(session.outliers("keys").layer))) == numbers
    last, grid = numbers[-1], session.attention_grid(pixels=8)
    assert torch.equal(session.attention(last, 1, pixels=8).values, grid.map(last, 1).values)
    assert 0 < run.plan.kept(last, 0).numel() < READ
    if 0 not in numbers:
        with pytest.raises(BadParameter, match=f"layer 0 has no keys and values here.* {last}"):
            session.attention(0, 0)


def test_a_model_that_forgets_its_state_among_several_tokens_is_told_one_by_one() -> None:
    forgets = {kind: states.singly for kind in KINDS if (states := fresh_states(model(kind))) is not None}
    assert forgets == {"qwen3_next": False, "lfm2": False, "jamba": True, "falcon_h1": False}
    assert any("token by token" in note for note in read("jamba").run(question=IDS[READ:], max_new_tokens=1).notes)
    with pytest.raises(NotApplicable, match="kvzip lets the model read on"):
        read("jamba").plan("kvzip")


def test_nothing_goes_on_from_the_midst_of_a_text_without_its_state() -> None:
    decoder = read("lfm2").run(max_new_tokens=1).decoder
    assert decoder is not None
    with pytest.raises(NotApplicable, match="keep a state of all that was read before"):
        forward(model("lfm2"), decoder, IDS[:2], torch.arange(4, 6))
    with pytest.raises(NotApplicable, match="ilre lets only the lower layers read"):
        read("lfm2").plan("ilre")
    assert refusal(decoder) == "some layers keep another state than keys and values"


def test_a_method_that_reads_in_pieces_carries_the_states_on() -> None:
    session = read("qwen3_next")
    run = session.run("xl3m", budget=1.0, chunk=16, question=IDS[READ:], max_new_tokens=4)
    assert run.plan.chunked
    assert run.tokens == generated("qwen3_next", IDS, 4)


def test_a_saved_session_goes_on_from_the_same_states(tmp_path: Path) -> None:
    session = read("falcon_h1")
    want = session.run(SnapKV(budget=0.5), question=IDS[READ:], max_new_tokens=3)
    session.save(tmp_path / "saved")
    loaded = wb.Session.load(tmp_path / "saved", model=(model("falcon_h1"), None))
    assert loaded.run(SnapKV(budget=0.5), question=IDS[READ:], max_new_tokens=3).tokens == want.tokens
    assert loaded.run(max_new_tokens=1).plan.state_nbytes == want.plan.state_nbytes


def test_a_shortened_copy_knows_where_its_layers_with_attention_were() -> None:
    twin = deepcopy(model("lfm2"))
    shorten(twin, [0, 2, 3])
    assert attending(twin) == (2,)
    assert origins(twin) == numbers_in(model("lfm2"), twin) == (3,)
    with pytest.raises(NotApplicable, match="derives the kinds of its layers from their numbers"):
        shorten(deepcopy(model("jamba")), [0, 1, 3])


def test_bfloat16_reads_and_decodes() -> None:
    session = wb.Session((deepcopy(model("qwen3_next")).bfloat16(), None))
    session.read(IDS[:READ])
    run = session.run(SnapKV(budget=0.5), question=IDS[READ:], max_new_tokens=2)
    assert run.plan.state_nbytes > 0
    assert run.quality.kl < 5


def test_a_model_without_any_attention_is_refused() -> None:
    with pytest.raises(NotApplicable, match="mamba has no layer with attention"):
        wb.Session((tiny_of("mamba"), None)).read(IDS)
