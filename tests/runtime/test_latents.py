"""Latent attention (MLA, DeepSeek and kin): what a layer's cache holds is held, counted, planned and stored as that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import config_of, tiny_of
from workbench.engine import standing
from workbench.errors import BudgetTooSmall, CheckpointRefused, WorkbenchError
from workbench.kv.ranking import for_all_heads
from workbench.kv.stores import LatentStore
from workbench.models import facts
from workbench.registry import registered
from workbench.runtime.exactness import verify
from workbench.runtime.steady_step import SteadyStep
from workbench.storage import sessions
from workbench.testing.stores import check_plan

TOKENS, NEW = 60, 6
IDS = torch.randint(3, 250, (TOKENS,), generator=torch.Generator().manual_seed(0))
QUESTION, MORE = [7, 90, 11, 200], [33, 4]
RANK, ROPE, LAYERS, HEADS = 32, 8, 4, 4  # of the tiny models
TOKEN = (RANK + ROPE) * 4  # bytes of a layer


def session_of(model: PreTrainedModel, **options: Any) -> wb.Session:
    made = wb.Session((model, None), **{"kv_dtype": "float32", **options})
    made.read(IDS)
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_of("deepseek_v3")


@pytest.fixture(scope="module")
def session(model: PreTrainedModel) -> wb.Session:
    return session_of(model)


def generated(model: PreTrainedModel, ids: Tensor) -> tuple[int, ...]:
    made: Any = model.generate(ids[None], max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    return tuple(made[0, len(ids) :].tolist())


def kv_nbytes(run: wb.Run) -> int:
    held = {name: nbytes for name, nbytes in run.memory.samples[-1].categories.items() if name.startswith("kv ")}
    assert "kv latent float32" in held
    return sum(held.values())


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_the_full_cache_is_r_and_rope_numbers_a_token_and_answers_as_transformers_does(kind: str) -> None:
    model = tiny_of(kind)
    session = session_of(model)
    plan = session.plan("full")
    assert plan.nbytes == plan.full_nbytes == TOKENS * LAYERS * TOKEN
    check_plan(plan)
    first = session.run("full", question=QUESTION, max_new_tokens=NEW)
    asked = torch.cat([IDS, torch.tensor(QUESTION)])
    assert first.tokens == generated(model, asked)
    assert kv_nbytes(first) == (len(asked) + NEW) * LAYERS * TOKEN  # with the room that was made
    second = first.ask(MORE, max_new_tokens=NEW)
    asked = torch.cat([asked, torch.tensor([*first.tokens, *MORE])])
    assert second.tokens == generated(model, asked)
    assert [store.entries for store in second.decoder.stores] == [HEADS * (len(asked) + NEW - 1)] * LAYERS
    assert first.quality.kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("held", [12, TOKENS])  # expanded as they are, and absorbed
def test_attention_over_rows_is_that_over_keys_and_values_made_by_hand(
    session: wb.Session, model: PreTrainedModel, held: int
) -> None:
    layer = session.trace.layers[1]
    store = session.plan("snapkv", budget=f"{held} tokens", window=4).stores()[1]
    assert isinstance(store, LatentStore)
    assert store.entries == HEADS * held
    projection: Any = model.get_submodule("model.layers.1.self_attn.kv_b_proj")
    maps = projection.weight.view(HEADS, 16 + 16, RANK)  # the keys' part without positions, then the values'
    query = torch.randn(HEADS, 3, 24, generator=torch.Generator().manual_seed(2))
    out, weights = store.attend(query, torch.tensor([TOKENS] * 3), layer.scoring, weights=True)
    assert weights is not None
    for head in range(HEADS):
        for row in range(3):
            scores, values = [], []
            for position in store.positions[head].tolist():
                latent, rotated = layer.latents.latent[0, position], layer.latents.rotated[0, position]
                key = torch.cat([maps[head, :16] @ latent, rotated])
                scores.append(query[head, row] @ key * layer.scale)
                values.append(maps[head, 16:] @ latent)
            softmax = torch.stack(scores).softmax(0)
            torch.testing.assert_close(out[head, row], softmax @ torch.stack(values), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[0, head, row], softmax, rtol=1e-4, atol=1e-6)


def test_who_drops_tokens_keeps_the_same_for_all_heads_by_the_mean_of_their_scores(session: wb.Session) -> None:
    method = wb.method("snapkv", budget=0.5, window=8, kernel=1)
    plan = session.plan(method)
    check_plan(plan)
    counts = plan.counts[:, 0]
    assert bool((plan.tiers == plan.tiers[:, :1]).all())
    assert plan.nbytes == int(counts.sum()) * (TOKEN + 4)  # and an int32 position, once
    assert plan.nbytes <= 0.5 * plan.full_nbytes < plan.nbytes + LAYERS * (TOKEN + 4)
    for layer in session.trace.layers:
        best = method.score(layer).mean(dim=0).topk(int(counts[layer.index])).indices.sort().values
        assert plan.kept(layer.index, 2).tolist() == best.tolist()
    assert "all heads keep the same tokens" in plan.notes[-1]


@pytest.mark.parametrize(
    "recipe",
    [
        wb.method("h2o", budget=0.5),
        wb.method("tova", budget=0.5),
        wb.method("streaming-llm", budget=0.5),
        wb.method("knorm", budget=0.5) | wb.method("decoding", every=1, queries=1),
    ],
    ids=str,
)
def test_who_evicts_while_decoding_evicts_from_all_heads_and_stays_as_large(session: wb.Session, recipe: Any) -> None:
    plan, run = session.plan(recipe), session.run(recipe, max_new_tokens=12)
    assert plan.expanded is None
    assert plan.nbytes <= 0.5 * plan.full_nbytes
    for planned, store in zip(plan.stores(), run.decoder.stores, strict=True):
        assert store.entries <= planned.entries
        assert len({tuple(row.tolist()) for row in store.positions}) == 1
        assert int(store.positions[0].max()) == TOKENS + 10


def test_steps_of_a_full_cache_are_the_same_work(session: wb.Session) -> None:
    run = session.run("h2o", budget=0.5, max_new_tokens=8)
    decoder = run.conversation.decoder()
    first = int(session.trace.logits.argmax())
    assert [first, *SteadyStep(decoder, first, 7).answer(())] == list(run.tokens)


def test_what_eviction_begins_with_is_the_attention_of_all_heads(session: wb.Session) -> None:
    layer = session.trace.layers[2]
    torch.testing.assert_close(
        layer.absorbed.received(), layer.received().sum(dim=0, keepdim=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("recipe", [("turbomind", {"key_bits": 4, "value_bits": 4}), ("kivi", {"residual": 32})])
def test_rows_are_stored_at_fewer_bits(session: wb.Session, recipe: tuple[str, dict[str, int]]) -> None:
    method = wb.method(recipe[0], **recipe[1])
    plan = session.plan(method)
    check_plan(plan)
    assert plan.expanded is None
    assert plan.nbytes < 0.7 * plan.full_nbytes
    rows = session.plan("full").stores()[0].contents(torch.float32)
    got = plan.stores()[0].contents(torch.float32)
    assert 0.001 < float((got.values - rows.values).norm() / rows.values.norm()) < 0.3
    both = session.run(wb.method("snapkv", budget=0.5) | method, max_new_tokens=NEW)
    assert both.to_dict(quality=False)["kv_share"] < plan.share


def test_heads_with_lengths_of_their_own_hold_expanded_keys_and_values_within_the_budget(session: wb.Session) -> None:
    plan = session.plan(wb.method("snapkv", budget=0.5) | wb.method("adakv"))
    check_plan(plan)
    assert plan.nbytes <= 0.5 * plan.full_nbytes
    assert "4.0 times as many numbers a token" in plan.notes[-1]  # 4 heads of 24 + 16, where the rows have 32 + 8
    whole = session.run(wb.method("snapkv") | wb.method("adakv"), budget=1.0, max_new_tokens=NEW)
    assert whole.quality.kl == pytest.approx(0.0, abs=1e-6)
    assert session.plan(wb.method("snapkv") | wb.method("adakv"), budget=1.0).nbytes == plan.full_nbytes


@pytest.mark.parametrize("key", ["think", "kcache"])
def test_a_store_of_keys_and_values_that_does_not_fit_is_refused_in_one_line(session: wb.Session, key: str) -> None:
    with pytest.raises(BudgetTooSmall, match="latent rows have to be expanded") as caught:
        session.plan(key, budget=0.9)
    assert "times the uncompressed cache" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["think", "kcache", "cskv", "mikv", "infllm", "streammem"])
def test_where_all_rows_fit_they_stay_whatever_a_method_would_hold(session: wb.Session, key: str) -> None:
    run = session.run(key, budget=1.0, max_new_tokens=NEW)
    assert run.plan.nbytes == run.plan.full_nbytes and run.plan.expanded is None
    assert run.quality.kl == pytest.approx(0.0, abs=1e-6)


def test_a_model_in_16_bits_is_exact_and_takes_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    half = tiny_of("deepseek_v2").to(torch.bfloat16)
    verify(half, facts(half))
    session = session_of(half, kv_dtype="bfloat16")
    assert session.plan("full").nbytes == TOKENS * LAYERS * TOKEN // 2
    assert session.run("full", max_new_tokens=NEW).quality.kl < 1e-3
    assert float(session.plan("full").error.max()) < 0.01


def test_layers_with_a_window_hold_the_rows_of_their_window() -> None:
    config = config_of("dots3_note_text")
    config.layer_types, config.sliding_window = ["sliding_attention", "indexed_attention"], 16
    config.rope_parameters = dict.fromkeys(config.layer_types, config.rope_parameters["indexed_attention"])
    torch.manual_seed(0)
    model: PreTrainedModel = type(tiny_of("dots3_note_text"))(config).eval()
    session = session_of(model)
    plan = session.plan("full")
    held = [len(store.positions[0]) for store in plan.stores()]
    assert held == [16, TOKENS]
    assert plan.nbytes == plan.full_nbytes == (16 + TOKENS) * TOKEN
    run = session.run("full", question=QUESTION, max_new_tokens=NEW)
    assert run.tokens == generated(model, torch.cat([IDS, torch.tensor(QUESTION)]))
    assert [len(store.positions[0]) for store in run.decoder.stores] == [16, TOKENS + len(QUESTION) + NEW - 1]


def test_an_expansion_that_is_not_linear_is_left_to_the_model() -> None:
    model = tiny_of("deepseek_v3")
    for module in list(model.modules()):
        if hasattr(module, "kv_b_proj"):
            plain = module.kv_b_proj
            module.kv_b_proj = nn.Linear(plain.in_features, plain.out_features)
            module.kv_b_proj.weight.data.copy_(plain.weight)
            nn.init.normal_(module.kv_b_proj.bias)
    session = session_of(model.requires_grad_(False))
    run = session.run("full", max_new_tokens=NEW)
    assert run.tokens == generated(model, IDS)
    assert session.plan("full").full_nbytes == TOKENS * LAYERS * TOKEN
    assert session.plan("snapkv", budget=0.5).expanded is None
    evicting = session.plan("h2o", budget=0.5)
    assert "h2o evicts by attention, and keys are not linear in rows here" in evicting.notes[-1]
    check_plan(evicting)
    assert len(session.run("h2o", budget=0.5, max_new_tokens=NEW).tokens) == NEW


def test_a_model_that_shows_no_rows_is_exact_and_says_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "_expands", lambda module: False)
    model = tiny_of("deepseek_v2")
    session = session_of(model)
    run = session.run("full", max_new_tokens=NEW)
    assert run.tokens == generated(model, IDS)
    assert session.plan("full").full_nbytes == TOKENS * LAYERS * HEADS * (24 + 16) * 4
    assert any("does not show here what it is held as" in note for note in run.notes)


@pytest.mark.parametrize("method", registered("kv"), ids=lambda method: method.key)
def test_every_method_holds_what_it_planned_within_the_budget_or_says_in_one_line_why_not(
    session: wb.Session, method: Any
) -> None:
    budget = {"budget": 0.5} if method().takes_budget() else {}
    try:
        plan = session.plan(method.key, **budget)
    except WorkbenchError as refusal:
        assert "\n" not in str(refusal)
        return
    assert plan.nbytes == sum(store.nbytes for store in plan.stores())
    assert plan.nbytes <= 0.5 * plan.full_nbytes or not budget
    assert all(store.holds_latents is (plan.expanded is None) for store in plan.stores())
    assert len(session.run(method.key, max_new_tokens=2, **budget).tokens) == 2


def test_what_is_shown_names_the_rows(session: wb.Session) -> None:
    assert "(MLA, latent 32 + 8 numbers a token)" in session.summary()
    assert "MLA, latent 32 + 8 numbers a token" in session.plan("full").summary()
    assert {x.kind for x in wb.models.audit(session).of("attention")} == {"full attention, MLA, latent 32 + 8"}


@pytest.mark.parametrize(("method", "linear"), [(wb.method("rtn", bits=8), True), (wb.method("activations"), False)])
def test_a_compressed_model_makes_keys_of_its_own_rows(session: wb.Session, method: Any, linear: bool) -> None:
    run = session.run(method, max_new_tokens=NEW)  # the second rounds what modules are given
    assert all(layer.latents.expansion.linear is linear for layer in run.plan.trace.layers)
    assert 0 < run.quality.kl < 0.2
    assert run.tokens == generated(run.conversation.model, IDS)
    assert kv_nbytes(run) == (TOKENS + NEW) * LAYERS * TOKEN


def test_a_saved_session_goes_on_from_its_rows_and_damaged_ones_are_refused(
    session: wb.Session, model: PreTrainedModel, tmp_path: Path
) -> None:
    before = session.run("snapkv", budget=0.5, question=QUESTION, max_new_tokens=NEW)
    folder = session.save(tmp_path / "session")
    again = wb.Session.load(folder, model=(model, None))
    assert again.run("snapkv", budget=0.5, question=QUESTION, max_new_tokens=NEW).tokens == before.tokens
    assert again.plan("full").full_nbytes == TOKENS * LAYERS * TOKEN
    tensors = load_file(folder / sessions.TENSORS)
    for bad in (torch.zeros(1, TOKENS, 4), torch.randn(1, TOKENS, RANK), torch.zeros(1, 3, RANK)):
        save_file(tensors | {"layers.0.latent": bad}, folder / sessions.TENSORS)
        with pytest.raises(CheckpointRefused, match="damaged"):
            wb.Session.load(folder, model=(model, None))


def test_scores_of_shared_entries_are_the_mean_of_the_heads() -> None:
    scores = torch.tensor([[[1.0, torch.inf], [3.0, 0.0]]])
    assert for_all_heads(scores).tolist() == [[[2.0, torch.inf]]]
