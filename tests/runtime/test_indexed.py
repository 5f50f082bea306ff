"""Models whose indexer chooses what each token attends to (DeepSeek-V3.2 and kin) are exact, whatever a store holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import outcome, tiny_of
from workbench.engine import attention_hook
from workbench.engine.states import has_indexer
from workbench.errors import NotApplicable, WorkbenchError
from workbench.models import facts
from workbench.models.linear import wanted_weights
from workbench.registry import registered
from workbench.runtime.exactness import verify
from workbench_kernels import Chosen, Scoring

TOKENS = 40
IDS = torch.randint(3, 250, (TOKENS,), generator=torch.Generator().manual_seed(0))
TOP = 8  # what a tiny model's indexer chooses


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_of("deepseek_v32")


@pytest.fixture(scope="module")
def session(model: PreTrainedModel) -> wb.Session:
    made = wb.Session((model, None), kv_dtype="float32")
    made.read(IDS)
    return made


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text", "hy_v4"])
def test_a_prompt_longer_than_the_choice_is_read_and_decoded_as_transformers_does(kind: str) -> None:
    found = outcome(kind)
    assert found.result == "exact", found.why
    assert set(found.looks.values()) == {"works"}


def test_verification_sees_a_choice_that_is_not_followed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    wide = tiny_of("deepseek_v32")
    for module in wide.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 2048  # as published: more than the few tokens that are compared
    monkeypatch.setattr(attention_hook, "_chosen", lambda *_: None)
    with pytest.raises(NotApplicable, match="other logits than the model itself"):
        verify(wide, facts(wide))
    assert {m.index_topk for m in wide.modules() if hasattr(m, "index_topk")} == {2048}


def test_a_model_in_16_bits_is_found_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    half = tiny_of("glm_moe_dsa").to(torch.bfloat16)
    verify(half, facts(half))


KEPT = [method.key for method in registered("kv")]


@pytest.mark.parametrize("key", KEPT)
def test_a_query_sees_what_was_chosen_and_is_still_held_or_the_method_says_why_not(
    session: wb.Session, key: str
) -> None:
    try:
        run = session.run(key, max_new_tokens=2)
    except WorkbenchError as error:
        assert "\n" not in str(error)
        return
    plan = session.plan(*run.recipe.methods)
    chosen = torch.tensor([[0, 1, 5, 17, 30, 31, 39, TOKENS]])
    scoring = Scoring(session.trace.layers[0].scale, chosen=Chosen(torch.tensor([TOKENS]), chosen))
    rows = torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(1))
    for store in plan.stores():
        if store.holder.retrieves or store.holder.selects:
            continue
        heads = store.kv_heads
        given = (rows[:heads], rows[:heads, :, :16])
        if store.holds_latents:
            given = (rows[:1, :, :8], rows[:2, :, :16].reshape(1, 1, 32))
        store.append(*given, torch.tensor([TOKENS]))
        positions, valid = store.slots()  # some move entries once they have attended
        _, weights = store.attend(rows, torch.tensor([TOKENS]), scoring, weights=True)
        assert weights is not None  # [k, g, 1, m]
        allowed = torch.isin(positions, chosen) if valid is None else torch.isin(positions, chosen) & valid
        outside = weights[:, :, 0].masked_fill(allowed[:, None].expand_as(weights[:, :, 0]), 0.0)
        assert not outside.any(), type(store).__name__
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


def test_a_layer_whose_owner_asks_for_its_dtype_stays_and_the_others_are_compressed(session: wb.Session) -> None:
    mixed = wb.method("rtn") | wb.method("snapkv", budget=0.5)
    assert len(session.run(mixed, max_new_tokens=3).tokens) == 3
    owner = tiny_of("deepseek_v32").get_submodule("model.layers.0.self_attn.indexer")
    assert wanted_weights(owner) == {"weights_proj"}


def test_a_query_none_of_whose_choice_is_held_gets_zeros(session: wb.Session) -> None:
    store = session.plan("streaming-llm", budget=0.3).stores()[0]
    lost = int(min(set(range(TOKENS)) - set(store.positions[0].tolist())))
    scoring = Scoring(0.25, chosen=Chosen(torch.tensor([TOKENS]), torch.tensor([[lost]])))
    out, _ = store.attend(torch.ones(4, 1, 24), torch.tensor([TOKENS]), scoring)
    assert not out.any()


@pytest.mark.parametrize("key", ["quest", "retrievalattention", "streaming-window", "xl3m"])
def test_who_chooses_too_or_reads_out_of_order_is_refused_in_one_line(session: wb.Session, key: str) -> None:
    with pytest.raises(NotApplicable, match="index") as caught:
        session.run(key, max_new_tokens=2)
    assert "\n" not in str(caught.value)


def test_the_indexers_keys_are_counted_and_go_on_by_copies(session: wb.Session, model: PreTrainedModel) -> None:
    assert has_indexer(model)
    states = session.trace.states
    assert states is not None
    per_token = model.config.num_hidden_layers * model.config.index_head_dim * 4
    assert states.nbytes == TOKENS * per_token
    first, second = (session.run("snapkv", budget=0.5, max_new_tokens=6) for _ in range(2))
    assert first.tokens == second.tokens
    assert states.nbytes == TOKENS * per_token
    assert first.memory.samples[-1].categories["state"] > states.nbytes


def test_attention_of_the_prompt_is_shown_under_the_choice(session: wb.Session) -> None:
    rows = session.trace.layers[1].attention(last=4)  # [k, g, 4, n]
    assert int((rows > 0).sum(dim=-1).max()) <= TOP
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones_like(rows[..., 0]))
    share = session.trace.score_share
    assert share is not None
    assert share == pytest.approx(sum(min(i + 1, TOP) for i in range(TOKENS)) / (TOKENS * (TOKENS + 1) / 2), rel=1e-3)


def test_a_saved_session_goes_on_as_before(session: wb.Session, model: PreTrainedModel, tmp_path: Path) -> None:
    want = session.run("snapkv", budget=0.5, max_new_tokens=6).tokens
    session.save(tmp_path / "saved")
    again = wb.Session.load(tmp_path / "saved", model=(model, None))
    assert again.run("snapkv", budget=0.5, max_new_tokens=6).tokens == want
    kept = [layer.scoring.chosen for layer in again.trace.layers]
    for mine, theirs in zip(session.trace.layers, kept, strict=True):
        assert isinstance(theirs, Chosen)
        assert mine.scoring.chosen is not None
        assert same(mine.scoring.chosen.keys, theirs.keys)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
