"""Sizes of layers that PrefixKV gives, and what LazyEviction remembers and evicts, against plain loops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from tests.kv.support import random_ranking, softmax_rows, trace_of
from workbench.errors import BadBudget
from workbench.kv import LazyEviction, PrefixKV, SnapKV
from workbench.kv.base import Study
from workbench.kv.methods.allocate.prefixkv import held_before, joining
from workbench.kv.plan import rank
from workbench.kv.ranking import Ranking
from workbench.kv.recurrence import mri_score, track_recurrence
from workbench.kv.stores import DenseStore
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.trace import Trace
    from workbench_kernels import Scoring

TOKENS = 60


# -- PrefixKV


def peaked(layers: int = 5, heads: int = 2, tokens: int = 80, protected: int = 5) -> tuple[Ranking, Tensor]:
    """Importance [l, n] that concentrates more and more from layer to layer, and a ranking beside its order."""
    uniform = torch.rand(layers, tokens, generator=torch.Generator().manual_seed(3))
    importance = uniform ** (1 + 3 * torch.arange(layers)[:, None])
    curves = torch.stack([held_before(layer) for layer in importance])
    return random_ranking(layers, heads, tokens).beside(joining(curves, protected)), importance


def size_at(importance: list[float], prefix: float, protected: int) -> int:
    """The fewest best positions that hold the prefix, and the protected ones on top."""
    held, total = 0.0, sum(importance)
    for count, part in enumerate(sorted(importance, reverse=True), 1):
        held += part / total
        if held >= prefix:
            return min(count + protected, len(importance))
    return len(importance)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_sizes_are_those_that_a_binary_search_for_the_prefix_finds(share: float) -> None:
    (ranking, importance), protected = peaked(), 5
    entries = int(share * ranking.scores.numel())
    total = entries // ranking.kv_heads
    curves = importance.double().tolist()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(size_at(curve, middle, protected) for curve in curves) <= total:
            low = middle
        else:
            high = middle
    counts = PrefixKV(sinks=4, recent=1).allocate(ranking, entries)
    expected = [size_at(curve, low, protected) for curve in curves]
    assert bool((counts[:, :1] == counts).all()) and int(counts.sum()) == total * ranking.kv_heads
    spare = total - sum(expected)  # of layers that pass the prefix together
    assert 0 <= spare < ranking.layers
    assert sum(abs(int(count) - size) for count, size in zip(counts[:, 0], expected, strict=True)) == spare
    if 0.2 < share < 0.9:
        assert int(counts[0, 0]) > int(counts[-1, 0])  # a layer that concentrates needs less


def test_every_layer_holds_nearly_the_same_share_of_its_importance() -> None:
    ranking, importance = peaked(tokens=2000, protected=1)
    counts = PrefixKV(sinks=0, recent=1).allocate(ranking, ranking.scores.numel() // 5)[:, 0]
    best = importance.sort(descending=True).values
    held = [float(layer[: int(count)].sum() / layer.sum()) for layer, count in zip(best, counts, strict=True)]
    assert max(held) - min(held) < 4e-3
    assert len(counts.unique()) == ranking.layers


def test_sizes_only_grow_with_the_budget_and_are_met_to_the_entry() -> None:
    alike = torch.stack([held_before(torch.ones(30))] * 4)
    single = torch.stack([held_before(torch.eye(30)[layer]) for layer in range(4)])
    uniform, nothing = (random_ranking(4, 2, 30).beside(joining(before, 5)) for before in (alike, single))
    for ranking in (peaked()[0], uniform, nothing):
        before = torch.zeros(ranking.layers, ranking.kv_heads, dtype=torch.long)
        for total in range(ranking.layers, ranking.layers * ranking.tokens + 1, 3):
            counts = PrefixKV().allocate(ranking, total * ranking.kv_heads)
            assert int(counts.sum()) == total * ranking.kv_heads and int(counts.min()) >= 1
            assert int(counts.max()) <= ranking.tokens and bool((counts >= before).all())
            before = counts


def test_sinks_and_the_last_token_come_first_in_all_layers() -> None:
    ranking, _ = peaked(protected=6)
    for total in (5, 12, 30):
        counts = PrefixKV(sinks=4, recent=2).allocate(ranking, total * ranking.kv_heads)[:, 0]
        assert int(counts.max() - counts.min()) <= 1
    assert int(PrefixKV(sinks=4, recent=2).allocate(ranking, 60 * ranking.kv_heads).min()) >= 6


def test_prefixkv_scores_by_attention_averaged_over_heads() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    expected = softmax_rows(layer).mean(dim=0).sum(dim=0).float()
    for recent in (1, 5):
        got = PrefixKV(sinks=3, recent=recent).score(layer)
        assert torch.allclose(got[:, 3:-recent], expected[3:-recent].expand(2, -1), atol=1e-5)
        assert bool(got[:, :3].isinf().all()) and bool(got[:, -recent:].isinf().all())


def test_prefixkv_divides_the_room_for_another_scorer() -> None:
    trace = trace_of(tokens=TOKENS)
    methods = [SnapKV(window=8, budget=0.4), PrefixKV()]
    plan = make_plan(trace, methods, torch.bfloat16)
    assert plan.stages.score is methods[0] and plan.stages.allocate is methods[1]
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= 0.4 * plan.full_nbytes
    assert torch.equal(plan.tiers == 1, rank(Study(trace), methods[0]).selected(plan.counts))


@pytest.mark.parametrize(("budget", "distance"), [("20 tokens", 5), ("20 tokens", 25), (0.3, 7)])
def test_while_decoding_a_layer_keeps_its_share_and_a_window_rolls(budget: str | float, distance: int) -> None:
    trace = trace_of(tokens=TOKENS)
    plan = make_plan(trace, [PrefixKV(budget=budget, distance=distance)], torch.float32)
    decoder = Decoder(tiny("llama"), plan.stores(), TOKENS, plan.stages.evict)
    held = [[plan.kept(layer.index, head).tolist() for head in range(2)] for layer in trace.layers]
    planned = [len(layer[0]) for layer in held]
    for token in range(TOKENS, TOKENS + 30):
        decoder.feed(torch.tensor([token]))
        for layer, size in zip(held, planned, strict=True):
            cut = size - distance if size > distance else size // 2  # found with the prompt, and the same ever after
            for row in layer:
                row.append(token)
                if len(row) > size + (token + 1 - TOKENS) * size // TOKENS:
                    del row[cut]
        assert [[row.tolist() for row in store.positions] for store in decoder.stores] == held
    assert any(len(layer[0]) > size for layer, size in zip(held, planned, strict=True))


def test_with_another_scorer_nothing_leaves_while_decoding() -> None:
    trace = trace_of(tokens=TOKENS)
    assert not make_plan(trace, [SnapKV(window=8, budget=0.4), PrefixKV()], torch.bfloat16).evicts
    assert not make_plan(trace, [PrefixKV(budget=0.4, decode=False)], torch.bfloat16).evicts


# -- LazyEviction


class Memory:
    """What one head remembers of its tokens, as a dictionary: position -> (steps since it recurred, MRI)."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.of = threshold, dict[int, tuple[float, float]]()

    def step(self, given: dict[int, float]) -> None:
        for position, weight in given.items():
            since, interval = self.of.get(position, (0.0, 0.0))
            since += 1
            if weight >= self.threshold:
                self.of[position] = (0.0, max(interval, since))
            else:
                self.of[position] = (since, interval)

    def matters(self, position: int) -> float:
        since, interval = self.of[position]
        often = 0.0 if interval == 0 else 2 / (1 + math.exp(interval - 1))
        return 2 / (1 + math.exp(min(1 + since / (interval + 1e-5), 700))) + often


@pytest.mark.parametrize("sizes", [(1,) * 9, (9,), (4, 5), (3, 1, 5)])
def test_recurrence_is_tracked_alike_one_by_one_and_together(sizes: tuple[int, ...]) -> None:
    old, new = 6, 9
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(2, new, old + new, generator=generator) ** 3
    weights = weights.masked_fill(torch.ones(new, old + new, dtype=torch.bool).triu(old + 1), 0.0)
    memory, done = torch.zeros(2, old, 2), 0
    for size in sizes:
        memory = torch.cat([memory, torch.zeros(2, size, 2)], dim=1)
        memory = track_recurrence(memory, weights[:, done : done + size, : old + done + size], threshold=0.4)
        done += size
    for head in range(2):
        plain = Memory(0.4)
        for step in range(new):
            plain.step({p: float(weights[head, step, p]) for p in range(old + step + 1)})
        for position in range(old + new):
            assert tuple(memory[head, position].tolist()) == plain.of[position]
            assert float(mri_score(memory)[head, position]) == pytest.approx(plain.matters(position), abs=1e-6)


@pytest.mark.parametrize("observed", [1, 20, TOKENS])
def test_the_prompt_is_scored_by_what_its_last_queries_saw_recur(observed: int) -> None:
    layer, threshold = trace_of(tokens=TOKENS).layers[1], 0.02
    asked = LazyEviction(observed=observed, threshold=threshold, window=8)
    rows, evidence, scores = softmax_rows(layer), asked.eviction_state(layer), asked.score(layer)
    assert evidence.shape == (2, TOKENS, 2)
    for head in range(layer.kv_heads):
        plain = Memory(threshold)
        for query in range(TOKENS - observed, TOKENS):
            plain.step({p: float(rows[2 * head : 2 * head + 2, query, p].max()) for p in range(query + 1)})
        assert [tuple(pair) for pair in evidence[head].tolist()] == [plain.of[p] for p in range(TOKENS)]
        for position in range(TOKENS - 8):
            assert float(scores[head, position]) == pytest.approx(plain.matters(position), abs=1e-6)
    assert bool(scores[:, -8:].isinf().all())


def test_a_token_that_recurs_regularly_outlives_one_that_is_overdue() -> None:
    # Since and MRI: just recurred; within its interval; far beyond it; never recurred.
    memory = torch.tensor([[[0.0, 20.0], [10.0, 20.0], [200.0, 20.0], [200.0, 0.0]]])
    assert mri_score(memory)[0].tolist() == sorted(mri_score(memory)[0].tolist(), reverse=True)


Seen = list[list[tuple[Tensor, Tensor]]]


def lazy_run(steps: int, asked: LazyEviction) -> tuple[Trace, Decoder, Seen, list[int]]:
    """A run of `steps` tokens: what each layer was given, query [h, 1, d] and key [k, 1, d], and its length after."""
    trace, model = trace_of(tokens=TOKENS), tiny("llama")
    plan = make_plan(trace, [asked], torch.float32)
    seen: Seen = [[] for _ in trace.layers]

    class Watched(Decoder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            seen[layer].append((query.clone(), key.clone()))
            return super().attend(layer, query, key, value, scoring)

    decoder = Watched(model, plan.stores(), TOKENS, plan.stages.evict)
    lengths = []
    for step in range(steps):
        decoder.feed(torch.tensor([(7 * step + 3) % 256]))
        lengths.append(decoder.stores[0].longest if isinstance(decoder.stores[0], DenseStore) else 0)
        assert sum(store.nbytes for store in decoder.stores) == plan.nbytes
    return trace, decoder, seen, lengths


def test_lagged_eviction_follows_the_plain_rule() -> None:
    room, steps, window, threshold = 24, 20, 5, 0.03
    asked = LazyEviction(budget=f"{room} tokens", window=window, threshold=threshold, observed=30)
    trace, decoder, seen, lengths = lazy_run(steps, asked)
    assert lengths == [room - window + 1 + step % window for step in range(steps)]
    plan = make_plan(trace, [asked], torch.float32)
    for layer in trace.layers:
        store, rows = decoder.stores[layer.index], softmax_rows(layer)
        assert isinstance(store, DenseStore) and store.eviction_state is not None
        for head in range(layer.kv_heads):
            plain = Memory(threshold)
            for query in range(TOKENS - 30, TOKENS):
                plain.step({p: float(rows[2 * head : 2 * head + 2, query, p].max()) for p in range(query + 1)})
            held = {p: layer.keys[head, p] for p in plan.kept(layer.index, head).tolist()}
            for step, (query, new) in enumerate(seen[layer.index]):
                if len(held) == room:
                    older = sorted(held)[: room - window]
                    for out in sorted(older, key=lambda p: (plain.matters(p), p))[:window]:
                        del held[out]
                held[TOKENS + step] = new[head, 0]
                keys = torch.stack(list(held.values()))
                given = torch.stack(
                    [(query[q, 0] @ keys.T * layer.scale).softmax(dim=0) for q in (2 * head, 2 * head + 1)]
                )
                plain.step(dict(zip(held, given.amax(dim=0).tolist(), strict=True)))
            assert store.positions[head].tolist() == sorted(held)
            for position, pair in zip(
                store.slot_positions[head].tolist(), store.eviction_state[head].tolist(), strict=True
            ):
                assert tuple(pair) == plain.of[position]


def test_what_lazy_eviction_remembers_is_counted() -> None:
    trace = trace_of(tokens=TOKENS)
    lazy = make_plan(trace, [LazyEviction(budget="24 tokens")], torch.bfloat16)
    plain = make_plan(trace, [LazyEviction(budget="24 tokens", decode=False)], torch.bfloat16)
    assert lazy.nbytes == sum(store.nbytes for store in lazy.stores())
    assert lazy.nbytes - plain.nbytes == 3 * 2 * 24 * 2 * 4  # layers, heads, entries, numbers, bytes


@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_small_caches_still_let_new_tokens_in(room: int) -> None:
    _, decoder, _, lengths = lazy_run(12, LazyEviction(budget=f"{room} tokens", window=4))
    assert max(lengths) <= room
    assert all(TOKENS + 11 in row.tolist() for store in decoder.stores for row in store.positions)


def test_a_prompt_that_stays_whole_is_observed_from_the_answer_on() -> None:
    room, steps, window, threshold = TOKENS + 6, 20, 4, 0.03
    asked = LazyEviction(budget=f"{room} tokens", window=window, threshold=threshold, prompt=False)
    trace, model = trace_of(tokens=TOKENS), tiny("llama")
    plan = make_plan(trace, [asked], torch.float32)
    assert plan.keeps_all
    assert plan.evicts
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes
    seen: Seen = [[] for _ in trace.layers]

    class Watched(Decoder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            seen[layer].append((query.clone(), key.clone()))
            return super().attend(layer, query, key, value, scoring)

    decoder = Watched(model, plan.stores(), TOKENS, plan.stages.evict)
    for step in range(steps):
        decoder.feed(torch.tensor([(7 * step + 3) % 256]))
        assert max(row.numel() for store in decoder.stores for row in store.positions) <= room
    for layer in trace.layers:
        for head in range(layer.kv_heads):
            plain, held = Memory(threshold), {p: layer.keys[head, p] for p in range(TOKENS)}
            for step, (query, new) in enumerate(seen[layer.index]):
                if len(held) == room:
                    older = sorted(held)[: room - window]
                    for out in sorted(older, key=lambda p: (plain.matters(p), p))[:window]:
                        del held[out]
                held[TOKENS + step] = new[head, 0]
                keys = torch.stack(list(held.values()))
                rows = [(query[q, 0] @ keys.T * layer.scale).softmax(dim=0) for q in (2 * head, 2 * head + 1)]
                plain.step(dict(zip(held, torch.stack(rows).amax(dim=0).tolist(), strict=True)))
            assert decoder.stores[layer.index].positions[head].tolist() == sorted(held)


@pytest.mark.parametrize("budget", [0.5, 1.0, "20 tokens", "64MiB"])
def test_a_prompt_that_stays_whole_needs_a_budget_for_more(budget: float | str) -> None:
    with pytest.raises(BadBudget, match="whole"):
        make_plan(trace_of(tokens=TOKENS), [LazyEviction(budget=budget, prompt=False)], torch.float32)
