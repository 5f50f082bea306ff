"""Attention in chunks (Llama 4): a query sees its own chunk, and nothing is held that no later query sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from benchmarks.model_kinds import tiny_of
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import forward
from workbench.errors import NotApplicable
from workbench.measure import column_sums
from workbench_kernels import Scoring, read_attention

CHUNK = 16  # of the layers 0 to 2; the last attends to everything, and sharpens by position from 8 on
IDS = torch.randint(3, 250, (64,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_of("llama4_text")


def session(model: PreTrainedModel, tokens: int, **options: object) -> wb.Session:
    made = wb.Session((model, None), kv_dtype="float32")
    made.read(IDS[:tokens], **options)  # type: ignore[arg-type]
    return made


def generated(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    made = model.generate(ids[None], max_new_tokens=count, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    return list(made[0, len(ids) :].tolist())


@pytest.mark.parametrize("tokens", [1, 9, 15, 16, 17, 40])
def test_reading_and_decoding_over_edges_equal_transformers(model: PreTrainedModel, tokens: int) -> None:
    made = session(model, tokens)
    assert list(made.run("full", max_new_tokens=20).tokens) == generated(model, IDS[:tokens], 20)
    question = IDS[tokens : tokens + 18]  # over an edge or two at once
    run = made.run("full", question=question, max_new_tokens=4)
    assert list(run.tokens) == generated(model, IDS[: tokens + 18], 4)


@pytest.mark.parametrize(("tokens", "held"), [(40, 8), (48, 16), (33, 1)])
def test_only_the_newest_chunk_is_held_and_counted(model: PreTrainedModel, tokens: int, held: int) -> None:
    made = session(model, tokens)
    plan = made.plan("full")
    stores = plan.stores()
    for layer in range(3):
        assert stores[layer].positions[0].tolist() == list(range(tokens - held, tokens))
        assert plan.exact[layer] == "attention in chunks of 16 tokens: it holds the newest one only"
    assert sum(store.nbytes for store in stores) == plan.nbytes == plan.full_nbytes
    assert plan.nbytes == 2 * 2 * 16 * 4 * (3 * held + tokens)  # keys and values, 2 heads of 16 numbers, float32


@pytest.mark.parametrize("recipe", [["snapkv"], ["h2o"], ["kivi"], ["snapkv", "kivi"]])
def test_a_compressed_chunk_is_let_go_of_at_its_end(model: PreTrainedModel, recipe: list[str]) -> None:
    made = session(model, 12)
    assert made.trace is not None and not made.trace.exact  # all in the first chunk: compressed like any other
    decoder = made.run(recipe, max_new_tokens=1).conversation.decoder()
    assert not decoder.turns(4) and decoder.turns(5)
    decoder.feed(IDS[12:15])
    assert all(int(store.positions[0][0]) < CHUNK for store in decoder.stores)
    twin = decoder.clone()
    decoder.feed(IDS[15:22])
    for store in decoder.stores[:3]:
        assert [row.tolist() for row in store.positions] == [list(range(CHUNK, 22))] * 2
    assert int(decoder.stores[3].positions[0][0]) < CHUNK
    one_by_one = torch.cat([twin.feed(token[None]) for token in IDS[15:22]])[-1]
    if recipe != ["h2o"]:  # which lets entries go at other moments
        torch.testing.assert_close(decoder.feed(IDS[22:23])[-1], twin.feed(IDS[22:23])[-1], rtol=1e-4, atol=1e-4)
    assert one_by_one.isfinite().all()


def test_layers_with_all_tokens_are_compressed_beside_chunks(model: PreTrainedModel) -> None:
    run = session(model, 40).run("snapkv", budget=0.6, max_new_tokens=12)
    assert run.to_dict(quality=False)["kv_share"] <= 0.6
    assert "layers 0, 1, 2: attention in chunks of 16 tokens" in " ".join(run.notes)


def test_looks_see_what_the_layer_saw(model: PreTrainedModel) -> None:
    made = session(model, 40)
    assert made.trace is not None
    layer = made.trace.layers[0]
    rows = torch.cat([block for _, block in layer.attention_rows()], dim=1)  # [h, n, n]
    at = torch.arange(40)
    seen = (at[None] <= at[:, None]) & (at[None] // CHUNK == at[:, None] // CHUNK)
    products = layer.queries @ layer.keys.repeat_interleave(layer.groups, dim=0).transpose(1, 2) * layer.scale
    want = products.float().masked_fill(~seen, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(rows, want)
    torch.testing.assert_close(
        layer.received(), column_sums(layer.queries, layer.keys, layer.scoring).view(2, 2, 40).sum(1)
    )
    torch.testing.assert_close(read_attention(layer.queries, layer.keys, layer.scoring).sums, want.sum(1))
    out = causal_attention(layer.queries, layer.keys, layer.values, layer.scoring)
    torch.testing.assert_close(out, want @ layer.values.repeat_interleave(layer.groups, dim=0))
    assert made.heads()["entropy"].notna().all()


def test_what_begins_where() -> None:
    at = torch.tensor([0, 6, 7, 15])
    assert Scoring(1.0).begin(at) is None
    for scoring, begin in [
        (Scoring(1.0, 3), [-2, 4, 5, 13]),
        (Scoring(1.0, chunk=7), [0, 0, 7, 14]),
        (Scoring(1.0, 3, chunk=7), [0, 4, 7, 14]),
    ]:
        found = scoring.begin(at)
        assert found is not None and found.clamp(min=0).tolist() == [max(place, 0) for place in begin]
        keys = torch.arange(16)
        assert torch.equal(scoring.visible(at, keys), (keys <= at[:, None]) & (keys >= found[:, None]))
    assert Scoring(1.0, chunk=7) != Scoring(1.0) and not Scoring(1.0, chunk=7).in_kernels


def test_a_saved_session_goes_on_in_chunks(model: PreTrainedModel, tmp_path: Path) -> None:
    made = session(model, 40)
    want = made.run("full", max_new_tokens=12).tokens
    made.save(tmp_path / "session")
    opened = wb.Session.load(tmp_path / "session", model=(model, None))
    assert opened.trace is not None and opened.trace.layers[0].chunk == CHUNK
    assert opened.run("full", max_new_tokens=12).tokens == want


def test_a_prompt_read_in_bounded_memory_goes_by_chunks_too(model: PreTrainedModel) -> None:
    whole, bounded = session(model, 64), session(model, 64, record=False)
    assert bounded.trace is not None and whole.trace is not None and bounded.trace.exact == whole.trace.exact
    run = bounded.run("infllm", budget=1.0, max_new_tokens=4)
    assert list(run.tokens) == generated(model, IDS[:64], 4)


def test_attention_methods_work_within_a_chunk_and_are_refused_beyond(model: PreTrainedModel) -> None:
    short = session(model, 12)
    assert len(short.run("block-sparse", max_new_tokens=8).tokens) == 8
    with pytest.raises(NotApplicable, match=r"^block-sparse: this model attends in chunks of 16 tokens"):
        session(model, 40).run("block-sparse", max_new_tokens=2)


def test_tokens_that_do_not_follow_one_another_are_refused(model: PreTrainedModel) -> None:
    class Anything:
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            return causal_attention(query, key, value, replace(scoring, chunk=None))

    with pytest.raises(NotApplicable, match="takes tokens that are read together for neighbours"):
        forward(model, Anything(), IDS[:3], torch.tensor([4, 9, 10]))
