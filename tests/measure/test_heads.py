"""What kind each head is: the streamed statistics against plain loops over the full matrix, and the classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.measure.test_attention import full_attention, some, some_positions
from workbench.errors import BadParameter, Cancelled, InputError, NotRead
from workbench.kv import HACK
from workbench.kv.base import Study
from workbench.measure import HeadStats, LiveBytes, Thresholds, column_sums, head_stats
from workbench.measure.head_classes import contextual
from workbench.measure.head_queries import probe_positions
from workbench.measure.heads import judge
from workbench.models import tiny
from workbench.progress import Progress
from workbench_kernels import Scoring

ModelOf = Callable[[str], PreTrainedModel]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def by_loops(
    probs: Tensor, ids: list[int], at: list[int], held: list[int], window: int | None, sinks: int, recent: int
) -> dict[str, float | list[float]]:
    """Every figure of one head, pair by pair; probs [nq, nk] float64."""
    bins = 1 + at[-1].bit_length()
    found: dict[str, list[float]] = {name: [] for name in ("entropy", "sink", "local", "retrieval", "distance")}
    profile = [0.0] * bins
    for row, i in zip(probs.tolist(), at, strict=True):
        pairs = [(j, p) for j, p in zip(held, row, strict=True) if j <= i and (window is None or i - j < window)]
        if not pairs:
            continue
        found["entropy"].append(-sum(p * math.log(p) for _, p in pairs if p > 0))
        found["distance"].append(sum(p * (i - j) for j, p in pairs))
        if i >= sinks:
            found["sink"].append(sum(p for j, p in pairs if j < sinks))
        if i >= recent - 1:
            found["local"].append(sum(p for j, p in pairs if i - j < recent))
        after = [p for j, p in pairs if 0 < j < i and ids[j - 1] == ids[i]]
        if after:
            found["retrieval"].append(sum(after))
        for j, p in pairs:
            profile[(i - j).bit_length()] += p
    rows = len(found["entropy"])
    shares = [mass / rows if rows else math.nan for mass in profile]
    return {**{name: mean(values) for name, values in found.items()}, "profile": shares}


def compared(stats: HeadStats, expected: list[dict[str, float | list[float]]]) -> None:
    for name in ("entropy", "sink", "local", "retrieval", "distance", "profile"):
        want = torch.tensor([head[name] for head in expected], dtype=torch.float32)
        got = getattr(stats, name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))  # k, group, tokens
windows = st.none() | st.integers(1, 50)
blocks = st.sampled_from([1, 500, 4000, 2**26])  # bytes: even these small matrices are cut into several


@settings(deadline=None, max_examples=80)
@given(shapes, windows, blocks, st.integers(1, 6), st.integers(1, 20), st.sampled_from([2, 9, 400]), st.integers(0, 99))
def test_statistics_equal_plain_loops_over_the_full_matrix(shape, window, block_bytes, sinks, recent, words, seed):
    k, group, n = shape
    queries, keys = some(seed, k * group, k, n, n)
    ids = torch.randint(0, words, (n,), generator=torch.Generator().manual_seed(seed))
    options = {"scoring": Scoring(0.3, window), "block_bytes": block_bytes}
    stats, received = head_stats(queries, keys, ids, sinks=sinks, recent=recent, **options)
    at = torch.arange(n)
    full = full_attention(queries, keys, 0.3, at, at, window)
    compared(stats, [by_loops(head, ids.tolist(), at.tolist(), at.tolist(), window, sinks, recent) for head in full])
    torch.testing.assert_close(received, column_sums(queries, keys, **options))
    torch.testing.assert_close(received.double(), full.sum(1), atol=1e-4, rtol=0)
    probed = full[:, probe_positions(n, 32)]
    variance = probed.var(dim=1, correction=0).sum(-1)
    torch.testing.assert_close(stats.variance.double(), variance, atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(shapes, windows, blocks, st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_statistics_follow_true_positions_after_eviction(shape, window, block_bytes, kept, own_positions, seed):
    k, group, n = shape
    kept = min(kept, n)
    queries, keys = some(seed, k * group, k, n, kept)
    ids = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(seed))
    held = some_positions(seed, k if own_positions else 1, kept, span=n)
    at = torch.arange(n)
    stats, _ = head_stats(
        queries,
        keys,
        ids,
        Scoring(0.3, window),
        recent=5,
        block_bytes=block_bytes,
        query_positions=at,
        key_positions=held if own_positions else held[0],
    )
    full = full_attention(queries, keys, 0.3, at, held.expand(k, -1), window)
    rows = held.expand(k, -1).repeat_interleave(group, dim=0).tolist()
    expected = [
        by_loops(head, ids.tolist(), at.tolist(), mine, window, 4, 5) for head, mine in zip(full, rows, strict=True)
    ]
    compared(stats, expected)


@pytest.mark.parametrize(
    ("window", "softcap", "sinks", "extra", "room"),
    [(None, None, False, 0, 1), (13, None, False, 9, 1), (None, 4.0, True, 0, 1 << 28), (20, None, True, 3, 1 << 28)],
)
def test_kernels_on_a_gpu_find_what_streamed_rows_say(window, softcap, sinks, extra, room, monkeypatch):
    n = 70
    queries, keys = some(3, 6, 3, n, n + extra)
    ids = torch.randint(0, 9, (n + extra,), generator=torch.Generator().manual_seed(3))
    scoring = Scoring(0.3, window, softcap, torch.linspace(-1, 2, 6) if sinks else None)
    stats, received = head_stats(queries, keys, ids, scoring, sinks=5, recent=12)
    monkeypatch.setattr("workbench.measure.whole_prompts.on_gpu", lambda *_: True)
    monkeypatch.setattr("workbench.measure.head_rows._SHARES_BYTES", room)  # 1: each KV head by itself
    found, more = head_stats(queries, keys, ids, scoring, sinks=5, recent=12)
    torch.testing.assert_close(more, received, atol=1e-4, rtol=1e-5)
    for each in fields(HeadStats):
        torch.testing.assert_close(getattr(found, each.name), getattr(stats, each.name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(None, False), (11, False), (11, True)])
def test_kernels_on_a_gpu_find_the_same_of_what_an_eviction_left(window, sinks, own_positions, monkeypatch):
    n, kept = 60, 25
    queries, keys = some(5, 6, 3, n, kept)
    ids = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(5))
    held = some_positions(5, 3 if own_positions else 1, kept, span=n)
    held[-1, -3:] = n  # slots that hold nothing
    scoring = Scoring(0.3, window, sinks=torch.linspace(-1, 2, 6) if sinks else None)
    options = {"query_positions": torch.arange(n), "key_positions": held}
    stats, received = head_stats(queries, keys, ids, scoring, **options)
    monkeypatch.setattr("workbench.measure.whole_prompts.on_gpu", lambda *_: True)
    monkeypatch.setattr("workbench.measure.head_rows._SHARES_BYTES", 1)
    found, more = head_stats(queries, keys, ids, scoring, **options)
    torch.testing.assert_close(more, received)
    alone = judge(queries, keys, ids, scoring, **options)
    for each in fields(HeadStats):
        value = getattr(found, each.name)
        torch.testing.assert_close(value, getattr(stats, each.name), atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(getattr(alone, each.name), value, atol=0, rtol=0, equal_nan=True)


def test_slots_beyond_the_prompt_count_for_nothing():
    queries, keys = some(0, 2, 1, 20, 12)
    ids = torch.arange(20) % 3
    held = torch.arange(0, 20, 2)
    options = {"scoring": Scoring(0.3), "query_positions": torch.arange(20)}
    plain, received = head_stats(queries, keys[:, :10], ids, key_positions=held, **options)
    padded = torch.cat([held, torch.tensor([20, 20])])
    found, more = head_stats(queries, keys, ids, key_positions=padded, **options)
    for name in ("entropy", "sink", "local", "retrieval", "distance", "variance", "profile"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), equal_nan=True)
    torch.testing.assert_close(more[:, :10], received)
    assert not more[:, 10:].any()


def pointing(to: Callable[[int], int], n: int = 64) -> HeadStats:
    """The statistics of a head whose query i looks at token to(i) alone; tokens repeat after half of the prompt."""
    keys = torch.eye(n)[None]
    queries = 100 * torch.stack([torch.eye(n)[to(i)] for i in range(n)])[None]
    return head_stats(queries, keys, torch.arange(n) % (n // 2), Scoring(1.0), recent=8)[0]


def test_heads_that_do_one_thing_score_one_at_it_and_nothing_else():
    sink = pointing(lambda i: 0)
    assert (sink.sink, sink.retrieval, sink.entropy) == (pytest.approx(1.0), pytest.approx(0.0), pytest.approx(0.0))
    assert sink.distance.item() == pytest.approx(31.5) and sink.local < 0.2
    local = pointing(lambda i: max(i - 1, 0))
    assert local.local.item() == pytest.approx(1.0) and local.distance.item() == pytest.approx(63 / 64)
    torch.testing.assert_close(local.profile[0, :3], torch.tensor([1 / 64, 63 / 64, 0.0]))
    induction = pointing(lambda i: i - 31 if i >= 32 else 0)
    assert induction.retrieval.item() == pytest.approx(1.0)
    assert induction.bins[5] == (16, 32) and induction.profile[0, 5] > 0.5
    # Vertical patterns have no variance over the queries; diagonal ones have much.
    assert sink.variance.item() == pytest.approx(0.0, abs=1e-6) and local.variance > 0.9


def test_a_token_does_not_retrieve_itself():
    stats, _ = head_stats(torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), torch.zeros(6, dtype=torch.long), Scoring(1.0))
    # All tokens are the same: query i sees i - 1 such tokens among i + 1, the first and itself left out.
    assert stats.retrieval.item() == pytest.approx(mean([(i - 1) / (i + 1) for i in range(2, 6)]))


def test_text_without_repetition_has_no_retrieval_score():
    stats, _ = head_stats(torch.zeros(1, 6, 4), torch.zeros(1, 6, 4), torch.arange(6), Scoring(1.0))
    assert stats.retrieval.isnan().all() and stats.local.isnan().all() and not stats.entropy.isnan().any()


def made(**figures: list[float]) -> HeadStats:
    """One layer's statistics with these figures, zero elsewhere."""
    count = len(next(iter(figures.values())))
    blank = {name: torch.zeros(1, count) for name in ("entropy", "sink", "local", "retrieval", "distance", "variance")}
    given = {name: torch.tensor([values]) for name, values in figures.items()}
    return HeadStats(**{**blank, **given}, profile=torch.zeros(1, count, 3))


def test_classes_are_tried_in_order_and_what_is_left_is_told_apart_by_variance():
    stats = made(
        retrieval=[0.3, math.nan, 0.1, 0.0, 0.0, 0.0],
        sink=[0.9, 0.9, 0.1, 0.2, 0.0, math.nan],
        local=[0.9, 0.9, 0.9, 0.2, 0.0, 0.0],
        variance=[0.9, 0.8, 0.3, 0.1, 0.6, 0.2],
    )
    assert stats.classes() == [["retrieval", "sink", "local", "contextual", "structural", "contextual"]]
    strict = Thresholds(retrieval=1, sink=1, local=1, contextual=0)
    assert stats.classes(strict) == [["structural"] * 6]
    frame = stats.to_frame(kv_heads=2)
    assert list(frame.columns) == [
        "layer", "head", "kv_head", "entropy", "sink", "local", "retrieval", "distance", "class"
    ]  # fmt: skip
    assert frame["kv_head"].tolist() == [0, 0, 0, 1, 1, 1]


def test_impossible_requests_are_refused():
    queries, keys, ids = torch.zeros(2, 5, 4), torch.zeros(1, 5, 4), torch.arange(5)
    for name in ("sinks", "recent", "probes"):
        with pytest.raises(BadParameter, match=name):
            head_stats(queries, keys, ids, Scoring(1.0), **{name: 0})
    with pytest.raises(InputError, match="token ids"):
        head_stats(queries, keys, ids[:4], Scoring(1.0))
    with pytest.raises(InputError, match="at least one"):
        head_stats(queries[:, :0], keys, ids, Scoring(1.0))
    with pytest.raises(BadParameter, match="sink"):
        Thresholds(sink=1.5)
    with pytest.raises(InputError, match="all layers"):
        head_stats(queries, keys, ids, Scoring(1.0))[0].classes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype):
    queries, keys = (x.to(dtype) for x in some(0, 4, 2, 50, 50))
    ids = torch.arange(50) % 7
    narrow, wide = (
        head_stats(q, k, ids, Scoring(0.3))[0] for q, k in ((queries, keys), (queries.float(), keys.float()))
    )
    torch.testing.assert_close(narrow.entropy, wide.entropy)
    torch.testing.assert_close(narrow.profile, wide.profile)


def test_memory_stays_that_of_a_few_blocks():
    n, mib = 8192, 2**20
    queries, keys = some(0, 1, 1, n, n, 64)
    ids = torch.arange(n) % 1000
    with LiveBytes() as live:
        head_stats(queries, keys, ids, Scoring(0.1))
    assert live.peak < 40 * mib < n * n * 4 / 6


# --- in a session


@pytest.fixture
def session(tiny_llama: PreTrainedModel) -> wb.Session:
    made = wb.Session((tiny_llama, None))
    made.read(torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(0)))
    return made


@pytest.mark.parametrize("architecture", ["llama", "mqa", "gemma3"])
def test_a_session_judges_every_head_of_its_model(tiny_model: ModelOf, architecture: str) -> None:
    session = wb.Session((tiny_model(architecture), None))
    trace = session.read(torch.randint(0, 40, (60,), generator=torch.Generator().manual_seed(0)))
    found = session.heads()
    facts = session.facts
    assert len(found) == facts.layers * facts.heads
    at = torch.arange(60)
    for layer in trace.layers:
        full = full_attention(layer.queries, layer.keys, layer.scale, at, at, layer.window, layer.softcap)
        for head, probs in enumerate(full):
            want = by_loops(probs, trace.ids.tolist(), at.tolist(), at.tolist(), layer.window, 4, 32)
            row = found[(found.layer == layer.index) & (found["head"] == head)].iloc[0]
            assert row.kv_head == head // layer.groups
            for name in ("entropy", "sink", "local", "retrieval", "distance"):
                assert row[name] == pytest.approx(want[name], abs=1e-4), name
    assert set(found["class"]) <= {"retrieval", "sink", "local", "contextual", "structural"}


def test_contextual_heads_are_those_that_hack_would_find(session: wb.Session) -> None:
    trace = session.trace
    assert trace is not None
    by_kv_head = session.head_stats().variance.unflatten(1, (trace.layers[0].kv_heads, -1)).mean(dim=2)  # [l, k]
    theirs = HACK(budget=0.5).importance(Study(trace))
    torch.testing.assert_close(by_kv_head, theirs, atol=1e-6, rtol=1e-4)
    assert contextual(by_kv_head, 0.5).sum() == theirs.numel() // 2


def test_judging_is_remembered_with_the_trace_by_recipe(session: wb.Session) -> None:
    first, half = session.head_stats(), session.head_stats("snapkv", budget=0.5, window=8)
    assert session.head_stats() is first
    assert session.head_stats("snapkv", budget=0.5, window=8) is half
    assert session.head_stats("snapkv", budget=0.6, window=8) is not half
    assert not torch.equal(first.entropy, half.entropy)
    session.read(torch.arange(30))
    assert session.head_stats() is not first


def test_judging_under_a_recipe_sees_only_what_it_keeps(session: wb.Session) -> None:
    trace, plan = session.trace, session.plan("snapkv", budget=0.5, window=8)
    assert trace is not None
    stats, at = session.head_stats("snapkv", budget=0.5, window=8), torch.arange(60)
    for layer in trace.layers:
        for head in range(layer.heads):
            kept = plan.kept(layer.index, head // layer.groups)
            keys = layer.keys[head // layer.groups, kept]
            probs = full_attention(layer.queries[head, None], keys[None], layer.scale, at, kept)[0]
            want = by_loops(probs, trace.ids.tolist(), at.tolist(), kept.tolist(), None, 4, 32)
            for name in ("entropy", "sink", "local", "retrieval", "distance"):
                got = getattr(stats, name)[layer.index, head].item()
                assert got == pytest.approx(want[name], abs=1e-4, nan_ok=True), name


def test_judging_reports_layers_and_can_be_cancelled(session: wb.Session) -> None:
    reports: list[tuple[str, int, int]] = []
    session.heads(progress=Progress(lambda *report: reports.append(report)))
    layers = session.facts.layers
    assert reports == [("judging heads", done, layers) for done in range(layers + 1)]
    progress = Progress()
    progress.cancel()
    with pytest.raises(Cancelled):
        session.heads("snapkv", budget=0.5, window=8, progress=progress)
    assert isinstance(session.heads("snapkv", budget=0.5, window=8), pd.DataFrame)


def test_judging_needs_a_recording() -> None:
    session = wb.Session((tiny("llama"), None))
    with pytest.raises(NotRead):
        session.heads()
    session.read(torch.arange(30), record=False)
    with pytest.raises(NotRead):
        session.heads()


def test_the_default_model_has_heads_of_every_kind(default_session: wb.Session) -> None:
    from workbench.examples import needle

    default_session.read(needle(600).text)
    found = default_session.heads()
    counts = found["class"].value_counts()
    assert set(counts.index) == {"retrieval", "sink", "local", "contextual", "structural"}
    assert counts["retrieval"] < 0.15 * len(found)  # few heads retrieve (Wu et al. 2024)
    assert found.retrieval.max() > 0.5
