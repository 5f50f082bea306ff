"""LiveVLM: a memory of fixed size spread over the stream, of which a question opens the pages it needs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

import workbench as wb
from tests.kv.support import SHORT, ids_of, reading
from workbench.kv import LiveVLM
from workbench.kv.bucketing import bucketed
from workbench.kv.stores import DenseStore
from workbench.kv.stores.paged import PagedStore
from workbench.models import tiny
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.trace import LayerTrace

QUICK = SHORT["livevlm"]


@pytest.mark.parametrize("retention", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("places", [1, 7, 20])
def test_the_best_stay_and_the_other_places_go_to_the_best_of_stretches_that_have_none(
    retention: float, places: int
) -> None:
    seeded = torch.Generator().manual_seed(places)
    positions = torch.randperm(90, generator=seeded)[:40].sort().values + 5
    scores = torch.rand(40, generator=seeded)
    order = sorted(range(40), key=lambda i: -float(scores[i]))
    kept: list[int] = []
    filled: set[int] = set()
    for i in order[: int(retention * places)]:
        kept.append(i)
        filled.add((int(positions[i]) - 5) * places // 90)
    for i in order[len(kept) :]:
        bucket = (int(positions[i]) - 5) * places // 90
        if len(kept) < places and bucket not in filled:
            kept.append(i)
            filled.add(bucket)
    for i in order:
        if len(kept) < places and i not in kept:
            kept.append(i)
    got = bucketed(scores, positions, 5, 95, places, retention)
    assert got.nonzero()[:, 0].tolist() == sorted(kept)


def paged(layer: LayerTrace, share: float = 0.4) -> PagedStore:
    """Every second entry of the first 40 dropped, as a memory would look."""
    keep = torch.ones(layer.kv_heads, layer.tokens, dtype=torch.bool)
    keep[:, 3:40:2] = False
    near = DenseStore.where(layer.keys, layer.values, keep, torch.float32)
    return PagedStore(near, layer.rotation, sinks=2, recent=60, page=5, share=share)


def test_a_question_opens_the_pages_whose_mean_keys_without_position_it_attends_to_most() -> None:
    layer = reading().trace.layers[1]
    store = paged(layer)
    where = store.positions[0].tolist()
    memory = [p for p in where if 2 <= p < 60]
    pages = [memory[i : i + 5] for i in range(0, len(memory), 5)]
    everywhere = torch.arange(70)
    keys, queries = (layer.rotation.turned_back(x, everywhere) for x in (layer.keys, layer.queries))
    relevance = [0.0] * len(pages)
    for head in range(layer.heads):
        means = [keys[head // layer.groups, page].mean(dim=0) for page in pages]
        for p in (66, 67, 68):
            scores = [float(queries[head, p] @ mean) * layer.scale for mean in means]
            weights = [math.exp(score - max(scores)) for score in scores]
            for i, weight in enumerate(weights):
                relevance[i] += weight / sum(weights)
    count = math.ceil(0.4 * len(pages))
    best = sorted(sorted(range(len(pages)), key=lambda i: -relevance[i])[:count])
    seen = sorted([0, 1, *(p for i in best for p in pages[i]), *(p for p in where if p >= 60)])

    got, _ = store.attend(layer.queries[:, 66:69], torch.arange(66, 69), layer.scoring)
    assert store.pages == tuple(best)
    for p in (66, 67, 68):
        past = [j for j in seen if j <= p]
        for head in range(layer.heads):
            k = head // layer.groups
            row = (layer.queries[head, p] @ layer.keys[k, past].T * layer.scale).softmax(dim=-1)
            torch.testing.assert_close(got[head, p - 66], row @ layer.values[k, past], atol=1e-5, rtol=1e-4)


def test_the_answer_stays_with_the_pages_of_its_question_and_another_question_opens_others() -> None:
    layer = reading().trace.layers[1]
    store = paged(layer)
    store.attend(layer.queries[:, 61:64], torch.arange(61, 64), layer.scoring)
    opened = store.pages
    for step in range(64, 68):
        store.attend(layer.queries[:, step : step + 1], torch.tensor([step]), layer.scoring)
        assert store.pages == opened
    twin = store.clone()
    twin.attend(-layer.queries[:, 61:64], torch.arange(61, 64), layer.scoring)
    assert twin.pages != opened == store.pages


def test_all_pages_open_is_plain_attention() -> None:
    layer = reading().trace.layers[1]
    store = paged(layer, share=1.0)
    at = torch.arange(66, 70)
    got, _ = store.attend(layer.queries[:, 66:], at, layer.scoring)
    want, _ = store.inner.attend(layer.queries[:, 66:], at, layer.scoring)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("architecture", ["llama", "mqa"])
def test_what_is_held_covers_the_whole_text_and_ends_with_all_of_the_recent_tokens(architecture: str) -> None:
    found = reading(architecture)
    plan = make_plan(found.trace, [LiveVLM(budget=0.5, **QUICK)], torch.bfloat16, model=found.model)
    for store in plan.stores():
        assert isinstance(store, PagedStore)
        held = store.positions[0].tolist()
        assert all(row.tolist() == held for row in store.positions)
        assert held[:2] == [0, 1] and held[-8:] == list(range(62, 70)) and store.recent == 62
        assert max(b - a for a, b in pairwise(held)) <= 70 // 4


def test_a_text_ten_times_the_bound_is_read_within_it() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(480), record=False)
    plan = session.plan(LiveVLM(budget="48 tokens", **QUICK))
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(v for name, v in sample.categories.items() if name.startswith("kv ")) for sample in reads]
    bound = 0.1 * plan.full_nbytes
    assert len(reads) > 10 and 0.9 * bound < kv[-1] <= max(kv) <= bound
