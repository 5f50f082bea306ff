"""Entries that leave while decoding by any scorer's scores of what is held, against plain loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import workbench as wb
from tests.kv.support import SHORT, softmax_rows, trace_of
from tests.readings import decoder_of, ids_of, session_on
from workbench.errors import BadRecipe, BudgetTooSmall, NotApplicable
from workbench.kv import AdaKV, Decoding, Knorm, LagKV, LookM, SnapKV
from workbench.kv.base import KVMethod
from workbench.kv.held import HeldLayer, scores_by_slot
from workbench.models import tiny
from workbench.registry import find, registered
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.testing import check_plan
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workbench.kv.plan import Plan
    from workbench_kernels import Scoring

TOKENS, WINDOW = 60, 4


class Votes(KVMethod):
    """Score by what the last queries gave, summed over the group."""

    key = "votes"
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.attention(last=WINDOW).sum(dim=(1, 2))


Seen = list[list[tuple[Tensor, Tensor, Tensor]]]


def decoded(methods: Sequence[Any], steps: int, dtype: torch.dtype = torch.float32) -> tuple[Plan, Decoder, Seen]:
    """A run of so many tokens, and the query [h, d], key [k, d] and value [k, d] that each layer was given."""
    trace = trace_of(tokens=TOKENS)
    plan = make_plan(trace, list(methods), dtype)
    seen: Seen = [[] for _ in trace.layers]

    class Watched(Decoder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            seen[layer].append((query[:, 0].clone(), key[:, 0].clone(), value[:, 0].clone()))
            return super().attend(layer, query, key, value, scoring)

    decoder = Watched(tiny("llama"), plan.stores(), TOKENS, plan.stages.evict)
    for step in range(steps):
        decoder.feed(torch.tensor([(7 * step + 3) % 256]))
        assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes
    return plan, decoder, seen


def simulated(
    plan: Plan, layer: LayerTrace, seen: Sequence[tuple[Tensor, Tensor, Tensor]], every: int
) -> list[set[int]]:
    """The positions that each head holds in the end."""
    held_by_head = []
    entries = [plan.kept(layer.index, head).numel() for head in range(layer.kv_heads)]
    for head in range(layer.kv_heads):
        keys = {p: layer.keys[head, p] for p in plan.kept(layer.index, head).tolist()}
        queries = [(p, layer.queries[2 * head : 2 * head + 2, p]) for p in range(TOKENS - WINDOW, TOKENS)]
        fewest = [len(keys)]
        for step, (query, key, _) in enumerate(seen):
            full = len(keys) == entries[head]
            if full:
                votes = dict.fromkeys(keys, 0.0)
                for position, rows in queries[-WINDOW:]:
                    visible = [p for p in keys if p <= position]
                    for row in rows:
                        scores = torch.stack([row @ keys[p] * layer.scale for p in visible]).softmax(dim=0)
                        for p, weight in zip(visible, scores.tolist(), strict=True):
                            votes[p] += weight
                shortest = min(entries)
                leaving = max(1, min(every, shortest // 4))
                for out in sorted(keys, key=lambda p: (votes[p], p))[:leaving]:
                    del keys[out]
            keys[TOKENS + step] = key[head]
            queries.append((TOKENS + step, query[2 * head : 2 * head + 2]))
            fewest.append(len(keys))
        held_by_head.append(set(keys))
    return held_by_head


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_lowest_scores_of_what_is_held_leave(every: int) -> None:
    methods = [Votes(budget="20 tokens"), Decoding(every=every, queries=WINDOW)]
    plan, decoder, seen = decoded(methods, steps=25)
    for layer in plan.trace.layers:
        want = simulated(plan, layer, seen[layer.index], every)
        assert [set(row.tolist()) for row in decoder.stores[layer.index].positions] == want


def test_heads_of_unequal_length_are_scored_one_by_one() -> None:
    methods = [Votes(budget="20 tokens"), AdaKV(), Decoding(every=3, queries=WINDOW)]
    plan, decoder, seen = decoded(methods, steps=25)
    assert len({plan.kept(1, head).numel() for head in range(2)}) == 2
    for layer in plan.trace.layers:
        want = simulated(plan, layer, seen[layer.index], 3)
        assert [set(row.tolist()) for row in decoder.stores[layer.index].positions] == want


def test_the_queries_held_are_counted_and_are_the_last_ones() -> None:
    plain = make_plan(trace_of(), [Knorm(budget="20 tokens"), Decoding(queries=0)], torch.bfloat16)
    plan, decoder, seen = decoded([Knorm(budget="20 tokens"), Decoding(queries=WINDOW)], 3, torch.bfloat16)
    layer = plan.trace.layers[0]
    assert plan.nbytes - plain.nbytes == 3 * WINDOW * (layer.heads * layer.queries.shape[2] * 2 + 4)
    for held, given in zip(decoder.stores, seen, strict=True):
        last = torch.stack([query for query, _, _ in given], dim=1).to(torch.bfloat16)
        assert torch.equal(held.queries[:, -3:], last)
        assert held.asked.tolist() == [59, 60, 61, 62] if TOKENS == 60 else True


@pytest.mark.parametrize(
    "key", [cls.key for cls in registered("kv") if issubclass(cls, KVMethod) and cls().supplies("score")]
)
def test_any_scorer_rescores_or_says_why_not(key: str, tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(80, 0))
    decode = {"decode": False} if "decode" in find(key).model_fields else {}
    found = find(key)(**{**SHORT.get(key, {}), **decode})
    if key == "decoding":
        return
    try:
        plan = session.plan([found, Decoding(every=5, queries=8)], budget=0.5)
    except BadRecipe as refusal:
        assert "decoding" in str(refusal)
        return
    decoder = decoder_of(session.model, plan)
    for token in ids_of(30, 1):
        decoder.feed(token[None])
        assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes
    for store in decoder.stores:
        assert all(int(row[-1]) == 109 and bool((row.diff() > 0).all()) for row in store.positions)


def test_rounded_entries_leave_one_by_one_and_the_others_stay_as_they_are(tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(80, 0))
    for bits, budget in ((4, 0.2), (4, 0.5), (16, 0.4)):  # of 4 bits, half a budget keeps the whole prompt
        turbomind = wb.method("turbomind", key_bits=4, value_bits=bits)
        plan = session.plan([Knorm(), AdaKV(), turbomind, Decoding(every=4, queries=0)], budget=budget)
        assert plan.keeps_all == (budget == 0.5)
        decoder = decoder_of(session.model, plan)
        before: dict[tuple[int, int, int], Tensor] = {}
        for token in ids_of(40, 1):
            decoder.feed(token[None])
            assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes
            for layer, store in enumerate(decoder.stores):
                held = store.contents(torch.float32)
                for head in range(2):
                    real = slice(None) if held.valid is None else held.valid[head]
                    both = torch.cat([held.keys[head], held.values[head]], dim=1)[real]
                    for position, row in zip(held.positions[head][real].tolist(), both, strict=True):
                        known = before.setdefault((layer, head, position), row)
                        assert torch.equal(known, row)
        assert decoder.stores[0].entries < len(before)


def test_what_leaves_goes_into_what_stays_where_the_recipe_merges() -> None:
    methods = [Knorm(budget="20 tokens"), LookM(strategy="averaged"), Decoding(every=3, queries=0)]
    trace = trace_of(tokens=TOKENS)
    plan = make_plan(trace, methods, torch.float32)
    store = plan.stores()[1]
    assert store.rescored is not None
    before = store.clone().contents(torch.float32)
    store.rescored.make_room(1)
    after = store.contents(torch.float32)
    for head in range(2):
        keys, values = before.keys[head], before.values[head]
        order = keys.norm(dim=1).argsort(descending=True)[:3].tolist()
        kept = [slot for slot in range(20) if slot not in order]
        sums = {slot: ([keys[slot]], [values[slot]]) for slot in kept}
        for slot in order:
            alike = [torch.cosine_similarity(keys[slot], keys[other], dim=0) for other in kept]
            home = kept[int(torch.stack(alike).argmax())]
            sums[home][0].append(keys[slot])
            sums[home][1].append(values[slot])
        found = dict(
            zip(after.positions[head].tolist(), zip(after.keys[head], after.values[head], strict=True), strict=True)
        )
        for slot, (k, v) in sums.items():
            got = found[int(before.positions[head, slot])]
            assert torch.allclose(got[0], torch.stack(k).mean(dim=0), atol=1e-5)
            assert torch.allclose(got[1], torch.stack(v).mean(dim=0), atol=1e-5)
    assert not torch.equal(before.keys[:, :17].sum(), after.keys.sum())


@pytest.mark.parametrize("merging", ["look-m", "ems"])
def test_merging_while_decoding_keeps_to_the_budget_also_where_heads_differ(
    merging: str, tiny_llama: PreTrainedModel
) -> None:
    session = session_on(tiny_llama, ids_of(80, 0))
    recipe = [SnapKV(window=8), AdaKV(window=8), wb.method(merging), Decoding(every=4, queries=8)]
    plan = session.plan(recipe, budget=0.4)
    decoder = decoder_of(session.model, plan)
    for token in ids_of(30, 1):
        assert bool(decoder.feed(token[None]).isfinite().all())
        assert sum(store.nbytes for store in decoder.stores) <= plan.nbytes


def test_a_view_of_what_is_held_is_the_reading_itself_where_nothing_left() -> None:
    layer = trace_of(tokens=TOKENS).layers[1]
    store = make_plan(trace_of(tokens=TOKENS), [wb.method("full")], torch.float32).stores()[1]
    asked = torch.arange(TOKENS - 8, TOKENS)
    rows = softmax_rows(layer)

    def checked(held: HeldLayer) -> Tensor:
        assert held.tokens == held.end == TOKENS
        assert torch.equal(held.keys, layer.keys)
        assert torch.allclose(held.attention(last=8).flatten(0, 1), rows[:, -8:].float(), atol=1e-5)
        assert torch.allclose(held.unrotated_queries(), layer.unrotated_queries()[:, -8:], atol=1e-5)
        assert torch.allclose(held.received(), rows[:, -8:].float().sum(dim=1).view(2, 2, -1).sum(dim=1), atol=1e-4)
        return SnapKV(window=8).score(held)

    got = scores_by_slot(layer.blank(0), store.contents(torch.float32), layer.queries[:, -8:], asked, checked)
    assert torch.allclose(got, SnapKV(window=8).score(layer), atol=1e-6)


def test_a_copy_goes_its_own_way_and_the_same_question_gets_the_same_answer(tiny_llama: PreTrainedModel) -> None:
    session = session_on(tiny_llama, ids_of(80, 0))
    recipe = [SnapKV(window=8), Decoding(every=5, queries=8)]
    run = session.run(recipe, budget=0.4, question=ids_of(50, 1), max_new_tokens=8)
    assert session.run(recipe, budget=0.4, question=ids_of(50, 1), max_new_tokens=8).tokens == run.tokens
    asked = [run.ask(ids_of(9, 2), max_new_tokens=6).tokens for _ in range(2)]
    assert asked[0] == asked[1]
    assert run.kv_nbytes <= run.plan.nbytes


def test_what_cannot_rescore_is_refused_with_the_reason() -> None:
    trace = trace_of(tokens=TOKENS)

    def plan(*methods: KVMethod) -> Plan:
        return make_plan(trace, list(methods), torch.bfloat16)

    for key, why in (("kivi", "together"), ("mikv", "merge or choose"), ("kvzip", "another scorer"), ("a2ats", "host")):
        scorer = [] if key == "kvzip" else [Knorm(budget=0.5)]
        with pytest.raises(BadRecipe, match=why):
            plan(*scorer, wb.method(key), Decoding())
    with pytest.raises(BadRecipe, match="h2o and decoding"):
        plan(wb.method("h2o"), Decoding())
    with pytest.raises(BadRecipe, match="rounded"):
        plan(Knorm(budget=0.5), LookM(), wb.method("turbomind"), Decoding())
    with pytest.raises(NotApplicable, match="raise `queries`"):
        plan(SnapKV(window=8), Decoding(queries=0))
    with pytest.raises(BudgetTooSmall, match="smallest"):
        plan(Knorm(), Decoding(budget=0.05, queries=64))


def test_a_whole_budget_holds_nothing_beside_the_entries() -> None:
    plan = make_plan(trace_of(tokens=TOKENS), [Knorm(), Decoding(budget=1.0)], torch.bfloat16)
    assert plan.keeps_all
    assert plan.nbytes == plan.full_nbytes


@pytest.mark.parametrize("store", [(), ("turbomind",)])
def test_what_is_planned_is_what_stores_hold(store: tuple[str, ...]) -> None:
    scorers = [Knorm(), SnapKV(window=8)]
    for scorer in scorers:
        others = [wb.method(key) for key in store]
        plan = make_plan(trace_of(), [scorer.with_budget(0.5), *others, Decoding(queries=8)], torch.bfloat16)
        check_plan(plan)


@pytest.mark.parametrize(("tokens", "budget"), [(60, 44), (60, 30), (20, 14)])
@pytest.mark.parametrize("chunk", [1, 7])
def test_lagkv_compresses_each_stretch_once_it_has_a_next_one(tokens: int, budget: int, chunk: int) -> None:
    sinks, lag, steps = 4, 8, 42
    trace = trace_of(tokens=tokens)
    plan = make_plan(trace, [LagKV(sinks=sinks, lag=lag, budget=f"{budget} tokens")], torch.float32)
    seen: Seen = [[] for _ in trace.layers]

    class Watched(Decoder):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
            seen[layer] += list(zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True))
            return super().attend(layer, query, key, value, scoring)

    decoder = Watched(tiny("llama"), plan.stores(), tokens, plan.stages.evict)
    ids = torch.tensor([(7 * step + 3) % 256 for step in range(steps)])
    for part in ids.split(chunk):
        decoder.feed(part)
    compared = max((tokens - sinks) // lag - 1, 0)
    rest = tokens - compared * lag
    share = (budget - rest) // compared if compared and budget > rest else budget * lag // tokens
    passes = [range(tokens + at, tokens + min(at + chunk, steps)) for at in range(0, steps, chunk)]
    for layer in trace.layers:
        for head in range(2):
            held = {p: (layer.keys[head, p], layer.values[head, p]) for p in plan.kept(layer.index, head).tolist()}
            done = compared
            for part in passes:
                while (part[0] - sinks) // lag - 1 > done:
                    first = sinks + done * lag
                    old = [p for p in held if first <= p < first + lag]
                    new = [p for p in held if first + lag <= p < first + 2 * lag]
                    scores = dict.fromkeys(old, 0.0)
                    for side in (0, 1):
                        low = torch.stack([held[p][side] for p in new]).amin(dim=0)
                        high = torch.stack([held[p][side] for p in new]).amax(dim=0)
                        spread = torch.stack([((held[p][side] - low) / (high - low)).std() for p in old]).softmax(dim=0)
                        for p, value in zip(old, spread.tolist(), strict=True):
                            scores[p] += value
                    for p in sorted(old, key=lambda p: scores[p])[: lag - share]:
                        del held[p]
                    done += 1
                for p in part:
                    _, key, value = seen[layer.index][p - tokens]
                    held[p] = (key[head], value[head])
            assert decoder.stores[layer.index].positions[head].tolist() == sorted(held)
    assert not make_plan(trace, [LagKV(lag=lag, budget=0.5, decode=False)], torch.float32).evicts
