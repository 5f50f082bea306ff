"""Quest: pages judged by the bounds of their keys, of which each new token attends to the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import SHORT, feasible, ids_of, model_of, random_layer, reading, trace_of
from workbench.budget import Budget
from workbench.errors import BadParameter, BadRecipe
from workbench.kv import KIVI, AdaKV, Quest, SnapKV
from workbench.kv.base import STAGES, KVMethod
from workbench.kv.stores import DenseStore
from workbench.kv.stores.page_bounds import PageBounds, PageSelection
from workbench.kv.stores.selected import SelectingStore
from workbench.models import tiny
from workbench.registry import find, registered
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.testing import check_plan

if TYPE_CHECKING:
    from workbench.kv.plan import Plan
    from workbench.trace import LayerTrace

QUICK = {"tokens": 12, "page": 4, "dense": 1}
KV = [cls for cls in registered("kv") if issubclass(cls, KVMethod)]


def made(cls: type[KVMethod]) -> KVMethod:
    decode = {"decode": False} if "decode" in cls.model_fields else {}
    return cls(**{k: v for k, v in SHORT.get(cls.key, {}).items() if k != "budget"}, **decode)


def store_of(layer: LayerTrace, held: Tensor, page: int = 4, pages: int = 3) -> SelectingStore:
    selector = PageSelection(torch.float32, page, pages, 0).build(layer, held)
    assert selector is not None
    return SelectingStore(DenseStore.where(layer.keys, layer.values, held, torch.float32), selector)


def pages_of(positions: list[int], first_new: int, *, uniform: bool, page: int = 4) -> list[list[int]]:
    """The positions of each page of a head: what came later begins one of its own where heads are unlike."""
    old, new = [p for p in positions if p < first_new], [p for p in positions if p >= first_new]
    stretches = [positions] if uniform else [old, new]
    return [part[i : i + page] for part in stretches for i in range(0, len(part), page)]


def by_hand(
    query: Tensor, keys: Tensor, values: Tensor, pages: list[list[int]], count: int, scale: float
) -> tuple[list[int], Tensor]:
    """Which positions one query head [d] attends to, and what it gets; keys and values [n, d] by position."""
    scores = []
    for members in pages:
        score = 0.0
        for channel in range(keys.shape[1]):
            numbers = [float(keys[p, channel]) for p in members]
            score += max(float(query[channel]) * min(numbers), float(query[channel]) * max(numbers))
        scores.append(score)
    best = sorted(range(len(pages)), key=lambda i: -scores[i])[:count]
    seen = sorted(p for i in best for p in pages[i])
    return seen, (keys[seen] @ query * scale).softmax(dim=0) @ values[seen]


@pytest.mark.parametrize("uniform", [True, False])
def test_each_query_head_attends_to_the_pages_whose_keys_could_match_it_best(uniform: bool) -> None:
    layer = random_layer(tokens=61)
    first = 42
    held = torch.zeros(2, 61, dtype=torch.bool)
    held[:, :first] = torch.rand(2, first, generator=torch.Generator().manual_seed(2)) < 0.7
    if uniform:
        held[1] = held[0].roll(1)
        held[1, 0] = held[0, first - 1]
        held[:, first:] = False
    assert bool(held[0].sum() == held[1].sum()) == uniform
    store = store_of(layer, held)
    for at in range(first, 61):
        part = slice(at, at + 1)
        store.append(layer.keys[:, part], layer.values[:, part], torch.tensor([at]))
        got, rows = store.attend(layer.queries[:, part], torch.tensor([at]), layer.scoring, weights=True)
        assert rows is not None
        computed = 0
        for head in range(4):
            positions = [*held[head // 2].nonzero()[:, 0].tolist(), *range(first, at + 1)]
            pages = pages_of(positions, first, uniform=uniform)
            k = head // 2
            seen, want = by_hand(layer.queries[head, at], layer.keys[k], layer.values[k], pages, 3, layer.scale)
            torch.testing.assert_close(got[head, 0], want, atol=1e-5, rtol=1e-4)
            weighed = rows[k, head % 2, 0].nonzero()[:, 0]
            where = store.slot_positions.expand(2, -1)[k, weighed]
            assert where.sort().values.tolist() == seen
            computed += len(seen) + len(pages)
        assert store.scores_computed == computed


def test_no_key_of_a_page_matches_a_query_better_than_its_bound() -> None:
    layer = random_layer(tokens=40)
    held = torch.ones(2, 40, dtype=torch.bool)
    selector = PageSelection(torch.float32, 8, 1, 0).build(layer, held)
    assert isinstance(selector, PageBounds)
    least, greatest = selector.bounds.view().chunk(2, dim=2)
    for head in range(4):
        products = layer.keys[head // 2] @ layer.queries[head, 7]
        query = layer.queries[head, 7]
        bound = torch.maximum(query * least[head // 2], query * greatest[head // 2]).sum(dim=1)
        assert bool((products.view(5, 8).amax(dim=1) <= bound + 1e-5).all())


@pytest.mark.parametrize("steps", [[1] * 11, [3, 8], [11], [5, 1, 1, 4]])
def test_bounds_that_grow_are_those_of_all_at_once(steps: list[int]) -> None:
    layer = random_layer(tokens=40)
    held = torch.arange(40).expand(2, -1) < 29
    selection = PageSelection(torch.float32, 4, 3, 0)
    grown, whole = selection.build(layer, held), selection.build(layer, torch.ones_like(held))
    assert isinstance(grown, PageBounds) and isinstance(whole, PageBounds)
    twin, at = grown.clone(), 29
    for count in steps:
        grown.append(layer.keys[:, at : at + count])
        at += count
    assert torch.equal(grown.bounds.view(), whole.bounds.view())
    assert twin.bounds.longest == 8  # a copy does not grow along


def test_a_question_and_the_first_layers_see_everything() -> None:
    found = reading()
    plan = make_plan(found.trace, [Quest(**QUICK)], torch.float32, model=found.model)
    stores = plan.stores()
    assert [isinstance(store, SelectingStore) for store in stores] == [i >= 1 for i in range(len(stores))]
    logits = Decoder(found.model, stores, 70).feed(ids_of(9, 1), logits=9)
    with torch.no_grad():
        want = found.model(torch.cat([found.trace.ids, ids_of(9, 1)])[None]).logits[0, -9:]
    assert float((logits - want).abs().max() / want.abs().max()) < 1e-4
    assert float(plan.error[0].max()) < 1e-5 < float(plan.error[1].min())


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
def test_attending_to_as_many_as_there_are_is_exact(architecture: str) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    session.read(ids_of(70, 1))
    full = session.run(question=ids_of(9, 2), max_new_tokens=24)
    run = session.run(Quest(tokens=1024), question=ids_of(9, 2), max_new_tokens=24)
    assert run.tokens == full.tokens and run.quality.kl < 1e-8
    less = session.run(Quest(**QUICK), question=ids_of(9, 2), max_new_tokens=24)
    assert less.quality.kl > 1e-4


def test_nothing_is_saved_and_what_is_computed_is_counted() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(400))
    plan = session.plan(Quest(page=4, tokens=16, dense=0))
    # Two keys for every four, in 16 bits like the keys and values themselves.
    assert plan.nbytes == plan.full_nbytes + plan.full_nbytes // 4 and plan.keeps_all
    run = session.run(Quest(page=4, tokens=16, dense=0), max_new_tokens=9)
    layers, heads = len(plan.trace.layers), plan.trace.layers[0].heads
    # Four pages, of which the newest may not be full, and a bound for every page there is.
    computed = sum(layers * heads * (16 + -(-(at + 1) // 4)) for at in range(400, 408))
    causal = sum(layers * heads * (at + 1) for at in range(400, 408))
    assert run.decode_score_share is not None
    assert computed * 0.9 < run.decode_score_share * causal <= computed
    assert session.run(Quest(page=4, tokens=16, dense=layers), max_new_tokens=9).decode_score_share == 1.0


@pytest.mark.parametrize("other", [cls for cls in KV if cls is not Quest], ids=lambda cls: cls.key)
def test_with_any_other_method_there_is_a_plan_or_one_reason_against_it(other: type[KVMethod]) -> None:
    trace = trace_of()
    methods = [made(other), Quest(**QUICK)]

    def plan_at(share: float) -> Plan:
        return make_plan(trace, methods, torch.bfloat16, Budget.parse(share), model_of(trace))

    try:
        plan = feasible(plan_at, 0.6)
    except BadRecipe as refusal:
        assert other.key in str(refusal) and "\n" not in str(refusal)
        return
    check_plan(plan)
    assert plan.nbytes <= max(0.6, plan.share) * plan.full_nbytes
    assert all(any(getattr(plan.stages, stage) is method for stage in STAGES) for method in methods)
    stores = plan.stores()
    assert isinstance(stores[1], SelectingStore)
    decoder = Decoder(reading().model, stores, plan.position)
    for token in range(3):
        decoder.feed(torch.tensor([token]))
    assert all(int(positions[-1]) == 72 for store in decoder.stores for positions in store.positions)


@pytest.mark.parametrize("key", ["h2o", "a2ats", "mikv", "fireq", "kcache", "streammem"])
def test_what_moves_entries_or_attends_in_its_own_way_is_refused(key: str) -> None:
    method = find(key)(**SHORT.get(key, {}))
    with pytest.raises(BadRecipe):
        make_plan(trace_of(), [method, Quest(**QUICK)], torch.bfloat16, Budget.parse(0.75), model_of(trace_of()))


def test_pages_of_what_is_kept_and_packed_are_selected_within_one_budget() -> None:
    trace = trace_of(tokens=200)
    methods = [SnapKV(window=8), AdaKV(), KIVI(group=8, residual=16), Quest(**QUICK)]
    plan = make_plan(trace, methods, torch.bfloat16, Budget.parse(0.3))
    check_plan(plan)
    without = make_plan(trace, methods[:3], torch.bfloat16, Budget.parse(0.3))
    assert plan.nbytes <= 0.3 * plan.full_nbytes and int(plan.counts.sum()) < int(without.counts.sum())


def test_a_budget_is_refused_since_nothing_is_saved() -> None:
    with pytest.raises(BadParameter, match="everything stays in memory"):
        Quest(budget=0.5)
    session = wb.Session((tiny("llama"), None))
    session.read(ids_of(40))
    with pytest.raises(BadRecipe, match="or selects"):
        session.plan([Quest(), wb.method("cca")])
