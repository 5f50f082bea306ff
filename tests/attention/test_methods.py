"""Attention methods: exact where they say so, small where they say so, and counted."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.attention.support import drawn
from workbench.attention import MASFormer, MemoryEfficient
from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.methods import memory_efficient as module
from workbench.attention.methods.memory_efficient import chunked_attention
from workbench.core.causal_attention import causal_attention
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.measure.memory import LiveBytes
from workbench.models import tiny
from workbench.registry import registered
from workbench_kernels import Scoring

IDS = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(0))


def by_loops(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    heads, tokens, _ = query.shape
    groups = heads // key.shape[0]
    out = torch.zeros(heads, tokens, value.shape[-1], dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            seen = [j for j in range(i + 1) if window is None or j > i - window]
            scores = [float(query[h, i].double() @ key[h // groups, j].double()) * scale for j in seen]
            if cap is not None:
                scores = [cap * math.tanh(score / cap) for score in scores]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            out[h, i] = sum(weight * value[h // groups, j] for weight, j in zip(weights, seen, strict=True))
    return out.float()


@pytest.fixture(scope="module")
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    session = wb.Session((tiny_llama, None), kv_dtype="float32")
    session.read(IDS)
    return session


# --- Memory-efficient attention


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("query_chunk", "key_chunk"), [(1, 1), (4, 3), (3, 7), (64, 64)])
def test_chunks_give_what_plain_loops_give(
    window: int | None, softcap: float | None, query_chunk: int, key_chunk: int
) -> None:
    query, key, value = drawn(17, dv=6)
    got = chunked_attention(
        query, key, value, Scoring(0.4, window, softcap), query_chunk=query_chunk, key_chunk=key_chunk
    )
    torch.testing.assert_close(got, by_loops(query, key, value, 0.4, window, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 33])
def test_chunks_equal_exact_attention_for_every_grouping(heads: int, kv_heads: int, window: int | None) -> None:
    query, key, value = drawn(200, heads, kv_heads, dv=8)
    want = causal_attention(query, key, value, Scoring(0.35, window))
    got = MemoryEfficient(query_chunk=32, key_chunk=48).attend(
        query, key, value, Scoring(0.35, window), PassContext(1, 200)
    )
    assert (got - want).abs().max() < 1e-5


def test_scores_far_beyond_what_exp_can_hold_stay_exact() -> None:
    query, key, value = drawn(64, sharpness=200.0, dv=8)
    want = causal_attention(query, key, value, Scoring(1.0))
    got = chunked_attention(query, key, value, Scoring(1.0), query_chunk=16, key_chunk=8)
    assert got.isfinite().all()
    assert (got - want).abs().max() < 1e-4


def test_working_memory_does_not_grow_with_the_length() -> None:
    def extra(tokens: int) -> int:
        query, key, value = drawn(tokens, dv=8)
        with LiveBytes() as live:
            out = chunked_attention(query, key, value, Scoring(0.3), query_chunk=32, key_chunk=32)
        return live.peak - out.nbytes

    short, long = extra(128), extra(640)
    assert long == short
    assert long < 4 * 640 * 640 * 4 / 20  # the matrix of scores


def test_chunks_that_no_query_sees_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = module.scaled_scores
    monkeypatch.setattr(
        module,
        "scaled_scores",
        lambda rows, keys, *rest: seen.append(rows.shape[2] * keys.shape[1]) or plain(rows, keys, *rest),
    )
    query, key, value = drawn(64, dv=8)
    chunked_attention(query, key, value, Scoring(0.3), query_chunk=8, key_chunk=8)
    assert sum(seen) == 8 * 8 * (8 * 9 // 2)  # the lower triangle of chunks
    seen.clear()
    chunked_attention(query, key, value, Scoring(0.3, 8), query_chunk=8, key_chunk=8)
    assert sum(seen) <= 64 * (8 + 8)


def test_a_run_is_the_same_token_by_token(session: wb.Session) -> None:
    full = session.run("full", max_new_tokens=12)
    run = session.run(MemoryEfficient(query_chunk=16, key_chunk=16), max_new_tokens=12)
    assert run.tokens == full.tokens
    assert run.plan.share == 1 and not run.notes
    assert (run.plan.trace.logits - full.plan.trace.logits).abs().max() < 1e-4


# --- MASFormer


def same_weights_as_mistral(window: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    llama, mistral = tiny("llama"), tiny("mistral", window=window)
    mistral.load_state_dict(llama.state_dict())
    return llama, mistral


def test_windows_everywhere_are_what_transformers_does_for_mistral() -> None:
    llama, mistral = same_weights_as_mistral(window=16)
    session = wb.Session((llama, None), kv_dtype="float32")
    session.read(IDS)
    run = session.run(MASFormer(window=16, full_layers=0), max_new_tokens=24)
    with torch.no_grad():
        out = mistral.generate(IDS[None], max_new_tokens=24, do_sample=False, pad_token_id=0)
        want = mistral(IDS[None]).logits[0, -1]
    assert (run.plan.trace.logits - want).abs().max() < 1e-4
    assert list(run.tokens) == out[0, len(IDS) :].tolist()


def test_a_window_as_long_as_everything_is_exact(session: wb.Session) -> None:
    full = session.run("full", max_new_tokens=12)
    run = session.run(MASFormer(window=len(IDS) + 12), max_new_tokens=12)
    assert run.tokens == full.tokens
    assert torch.equal(run.plan.trace.logits, full.plan.trace.logits) or (
        (run.plan.trace.logits - full.plan.trace.logits).abs().max() < 1e-4
    )
    assert run.plan.share == 1


def test_layers_with_a_window_store_only_the_window(session: wb.Session) -> None:
    run = session.run(MASFormer(window=20, full_layers=0.34), max_new_tokens=30)
    assert run.plan.full_nbytes == session.plan("full").full_nbytes  # what the plain model would hold
    assert run.plan.share == pytest.approx((120 + 20 + 20) / (3 * 120))
    assert run.plan.nbytes == sum(store.nbytes for store in run.plan.stores())
    per_token = run.plan.full_nbytes // (3 * 120)
    assert run.memory.samples[-1].kv_layers[0] == 20 * per_token  # thirty tokens later still
    (note,) = run.notes
    assert note.startswith("layers 0, 2: sliding window of masformer")


def test_the_models_own_windows_are_not_counted_as_a_saving() -> None:
    session = wb.Session((tiny("gemma3", window=16), None), kv_dtype="float32")  # layers 0 and 2 slide
    session.read(IDS)
    plain = session.plan("full")
    assert plain.share == 1
    narrowed = session.plan(MASFormer(window=8, full_layers=0))
    assert narrowed.full_nbytes == plain.full_nbytes
    assert narrowed.share == pytest.approx((8 + 8 + 8) / (16 + 120 + 16))
    wider = session.plan(MASFormer(window=40, full_layers=0))
    assert wider.share == pytest.approx((16 + 40 + 16) / (16 + 120 + 16))
    assert "masformer" in wider.exact[1] and "masformer" not in wider.exact[0]


@pytest.mark.parametrize("layers", [1, 3, 8, 30])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("where", ["bottom", "middle", "top", "spread"])
def test_as_many_layers_see_everything_as_asked(where: str, share: float, layers: int) -> None:
    method = MASFormer(full_layers=share, where=where)
    full = [layer for layer in range(layers) if method.sees_all(layer, layers)]
    assert abs(len(full) - share * layers) <= 0.5
    if full and len(full) < layers and where != "spread":
        assert full == list(range(full[0], full[-1] + 1))
        assert (full[0] == 0) == (where == "bottom" or (where == "middle" and (layers - len(full)) // 2 == 0))
        assert (full[-1] == layers - 1) == (where == "top")
    if where == "spread" and len(full) > 2:
        gaps = [b - a for a, b in pairwise(full)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("budget", [1, 0.9, 0.5, 0.3])
@pytest.mark.parametrize("tokens", [40, 120])
def test_the_window_is_the_widest_that_meets_the_budget(budget: float, tokens: int) -> None:
    layers, full = 8, 8 * tokens * (tokens + 1) // 2
    method = MASFormer(budget=budget)
    assert method.entries(tokens, layers) <= budget * full
    window = method.span(0, layers, tokens)
    if window is None:
        assert budget == 1
    else:
        assert MASFormer(window=window + 1).entries(tokens, layers) > budget * full


def test_a_larger_budget_never_narrows_the_window(session: wb.Session) -> None:
    layers, tokens = 12, 500
    windows = [MASFormer(budget=b / 100).span(0, layers, tokens) or tokens for b in range(26, 101)]
    assert windows == sorted(windows) and windows[0] < windows[-1] == tokens
    shares = [session.plan("masformer", budget=b).share for b in (0.4, 0.6, 0.8, 1)]
    assert shares == sorted(shares) and len(set(shares)) == 4


def test_the_window_stays_while_decoding(session: wb.Session) -> None:
    run = session.run("masformer", budget=0.5, max_new_tokens=20)
    window = MASFormer(budget=0.5).span(0, 3, len(IDS))
    by_hand = session.run(MASFormer(window=window), max_new_tokens=20)
    assert run.tokens == by_hand.tokens and run.kv_nbytes == by_hand.kv_nbytes


# --- Budgets of all attention methods


METHODS = registered("attention")
SPANS = [method for method in METHODS if method.entries is AttentionMethod.entries]  # seen is what their spans leave
BUDGETED = [method for method in METHODS if not method.all_scores]


@pytest.mark.parametrize("method", SPANS, ids=lambda method: method.key)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_entries_are_those_that_a_loop_counts(method: type[AttentionMethod], tokens: int) -> None:
    made = method(window=5) if "window" in method.model_fields else method()
    layers, counted = 5, 0
    for layer in range(layers):
        window = made.span(layer, layers, tokens)
        counted += sum(1 for i in range(tokens) for j in range(i + 1) if window is None or j > i - window)
    assert made.entries(tokens, layers) == counted
    if method is MemoryEfficient:
        assert counted == layers * tokens * (tokens + 1) // 2 == layers * visible_entries(tokens)


@pytest.mark.parametrize("method", BUDGETED, ids=lambda method: method.key)
def test_too_small_a_budget_names_the_smallest_which_then_works(
    session: wb.Session, method: type[AttentionMethod]
) -> None:
    with pytest.raises(BudgetTooSmall) as caught:
        session.run(method(budget=0.005), max_new_tokens=2)
    smallest = caught.value.smallest
    assert f"{smallest:.4g}" in str(caught.value)
    made = method(budget=smallest)
    assert len(session.run(made, max_new_tokens=2).tokens) == 2
    assert made.entries(len(IDS), 3) <= smallest * 3 * visible_entries(len(IDS))


@pytest.mark.parametrize("budget", ["64MiB", "512 tokens"])
def test_a_budget_of_scores_is_a_share(budget: str) -> None:
    with pytest.raises(BadBudget, match="share of score entries"):
        MASFormer(budget=budget)


def test_eviction_on_top_counts_against_the_plain_cache(session: wb.Session) -> None:
    run = session.run([wb.kv.SnapKV(budget=0.3, window=8), MASFormer(window=16)], max_new_tokens=4)
    assert run.plan.share <= 0.3
    assert run.plan.full_nbytes == session.plan("full").full_nbytes
