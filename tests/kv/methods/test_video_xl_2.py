"""Video-XL-2: chunks read with few of the others, held coarse, and fetched whole where the question needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench.errors import BadParameter
from workbench.kv import VideoXL2
from workbench.kv.stores.levels import LevelStore
from workbench.models import tiny
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.trace import LayerTrace

SIZES = {"room": 34, "chunk": 8, "marks": 2, "pool": 4, "before": 1, "whole": 2}


def read(layer: LayerTrace, tokens: int = 64) -> tuple[LevelStore, Tensor]:
    """A store that has read the first tokens, and what they got [h, n, dv]."""
    store = LevelStore.empty(layer.keys[:, :0], layer.values[:, :0], **SIZES)
    outs = []
    for start in range(0, tokens, 8):
        at = torch.arange(start, start + 8)
        store.append(layer.keys[:, at], layer.values[:, at], at)
        assert store.near.longest <= SIZES["room"]
        outs.append(store.attend(layer.queries[:, at], at, layer.scoring)[0])
    store.reading = False
    return store, torch.cat(outs, dim=1)


def attended(layer: LayerTrace, head: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (query @ keys.T * layer.scale).softmax(dim=-1) @ values


def test_while_reading_a_token_sees_its_chunk_the_one_before_and_the_marks_of_all() -> None:
    layer = reading().trace.layers[1]
    _, got = read(layer)
    for p in range(64):
        seen = [j for j in range(p + 1) if j % 8 < 2 or p // 8 - j // 8 <= 1]
        for head in range(layer.heads):
            k = head // layer.groups
            want = attended(layer, head, layer.queries[head, p], layer.keys[k, seen], layer.values[k, seen])
            torch.testing.assert_close(got[head, p], want, atol=1e-5, rtol=1e-4)


def test_a_question_sees_first_newest_and_most_relevant_chunks_whole_and_means_of_the_rest() -> None:
    layer = reading().trace.layers[1]
    store, _ = read(layer)
    # 8 chunks and room for 34 entries: 5 chunks left 2 marks each, 3 are whole.
    assert store.coarse == 5 and store.near.longest == 5 * 2 + 3 * 8
    groups = {c: [list(range(8 * c + 2, 8 * c + 6)), [8 * c + 6, 8 * c + 7]] for c in range(5)}
    near = [j for j in range(64) if j >= 40 or j % 8 < 2]
    stood = [(c, group) for c in range(5) for group in groups[c]]

    def with_means(k: int, chunks: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is near, the means of the chunks, and the others whole."""
        coarse = [group for c, group in stood if c in chunks]
        others = [j for c, group in stood if c not in chunks for j in group]
        keys, values = (
            torch.cat([of[near], *(of[group].mean(dim=0, keepdim=True) for group in coarse), of[others]])
            for of in (layer.keys[k], layer.values[k])
        )
        return keys, values

    relevance = torch.zeros(5)
    asked = range(64, 67)
    for head in range(layer.heads):
        keys, _ = with_means(head // layer.groups, list(range(5)))
        for p in asked:
            weights = (layer.queries[head, p] @ keys.T * layer.scale).softmax(dim=-1)
            for (c, _), weight in zip(stood, weights[len(near) :], strict=True):
                relevance[c] += weight
    best = [0, *(relevance[1:].topk(2).indices + 1).tolist()]
    rest = [c for c in range(5) if c not in best]

    at = torch.arange(64, 67)
    got, _ = store.attend(layer.queries[:, at], at, layer.scoring)
    assert store.chunks == tuple(sorted(best))
    for p in asked:
        for head in range(layer.heads):
            want = attended(layer, head, layer.queries[head, p], *with_means(head // layer.groups, rest))
            torch.testing.assert_close(got[head, p - 64], want, atol=1e-5, rtol=1e-4)

    chosen = store.chunks  # the answer stays with them
    store.attend(-layer.queries[:, 67:68], torch.tensor([67]), layer.scoring)
    assert store.chunks == chosen


def test_with_every_chunk_fetched_a_question_attends_to_all_that_was_read() -> None:
    layer = reading().trace.layers[1]
    store, _ = read(layer)
    store.whole = 8
    got, _ = store.attend(layer.queries[:, 64:65], torch.tensor([64]), layer.scoring)
    for head in range(layer.heads):
        k = head // layer.groups
        want = attended(layer, head, layer.queries[head, 64], layer.keys[k, :64], layer.values[k, :64])
        torch.testing.assert_close(got[head, 0], want, atol=1e-5, rtol=1e-4)


def test_nothing_is_lost_and_small_budgets_pool_more() -> None:
    found = reading()
    pools = []
    for budget in (0.4, 0.7):
        method = VideoXL2(budget=budget, chunk=8, marks=1, pool=2)
        plan = make_plan(found.trace, [method], torch.bfloat16, model=found.model)
        assert bool((plan.tiers > 0).all()) and plan.precisions == ("bfloat16", "host") and plan.host_nbytes
        store = plan.stores()[0]
        assert isinstance(store, LevelStore) and not store.reading
        pools.append(store.pool)
    assert pools[0] > pools[1] == 2


def test_a_text_ten_times_the_bound_is_read_within_it() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(1200), record=False)
    plan = session.plan(VideoXL2(budget="120 tokens", chunk=40, marks=1))
    reads = [sample for sample in plan.timeline.samples if sample.phase == "read"]
    kv = [sum(v for name, v in sample.categories.items() if name.startswith("kv ")) for sample in reads]
    bound = 0.1 * plan.full_nbytes
    assert len(reads) > 10 and 0.7 * bound < kv[-1] <= max(kv) <= bound
    run = session.run(VideoXL2(budget="120 tokens", chunk=40, marks=1), question=ids_of(9), max_new_tokens=3)
    assert len(run.ask(ids_of(5), max_new_tokens=2).tokens) == 2


def test_marks_have_to_fit_into_a_chunk() -> None:
    with pytest.raises(BadParameter, match="fewer than a chunk"):
        make_plan(reading().trace, [VideoXL2(chunk=4)], torch.float32, model=reading().model)
