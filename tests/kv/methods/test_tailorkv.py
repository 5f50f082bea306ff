"""TailorKV: layers that look everywhere are quantised, of the others a few entries are fetched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import workbench as wb
from tests.kv.support import ids_of, reading, traced
from workbench import testing
from workbench.core.memo import Memo
from workbench.kv import AdaKV, SnapKV, TailorKV
from workbench.kv.base import KVMethod, Study
from workbench.kv.dense_preference import dense_preference, of_model
from workbench.kv.ranking import Ranking
from workbench.kv.stores.channels import ChannelIndex
from workbench.kv.stores.offload import OffloadStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.tailored import TailoredFormat
from workbench.models import tiny
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.plan import Plan


def plan_of(trace: Trace, **parameters: Any) -> Plan:
    short = {"group": 8, "residual": 16, "fetch": 16}
    return make_plan(trace, [TailorKV(**{**short, **parameters})], torch.bfloat16)


def preferences(trace: Trace, share: float = 0.05) -> list[float]:
    found: list[float] = TailorKV(share=share).preference(Study(trace)).tolist()
    return found


def between(values: list[float]) -> float:
    """A threshold that one layer is above."""
    ordered = sorted(values)
    return (ordered[-1] + ordered[-2]) / 2


@pytest.mark.parametrize(("tokens", "share"), [(70, 0.05), (70, 0.4), (20, 0.05), (1, 0.05)])
def test_the_dense_preference_is_what_the_largest_weights_leave_over(tokens: int, share: float) -> None:
    trace = reading(tokens=tokens).trace
    for layer, found in zip(trace.layers, preferences(trace, share), strict=True):
        queries, left = range(max(tokens - 32, 0), tokens), 0.0
        for head in range(layer.heads):
            for q in queries:
                key = layer.keys[head // layer.groups]
                exps = [math.exp(float(layer.queries[head, q] @ key[i]) * layer.scale) for i in range(q + 1)]
                weights = sorted((x / sum(exps) for x in exps), reverse=True)
                left += 1 - sum(weights[: max(int(share * tokens), 1)])
        assert found == pytest.approx(left / layer.heads / len(queries), abs=1e-5)


def test_one_that_looks_at_everything_is_denser_than_one_that_looks_at_one_token() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 200, 16, generator=draw), torch.randn(2, 200, 16, generator=draw)
    nothing = LayerTrace(0, keys, values, torch.zeros(4, 200, 16), torch.device("cpu"), Scoring(0.25))
    keys = keys.clone()
    keys[:, 5] = 40.0
    one = LayerTrace(1, keys, values, torch.ones(4, 200, 16), torch.device("cpu"), Scoring(0.25))
    found = [dense_preference(layer.queries, layer.keys, layer.scoring, 0.05) for layer in (nothing, one)]
    assert found[0] == pytest.approx(0.95, abs=5e-3) and found[1] < 1e-3


def test_layers_are_classed_once_for_each_model_whatever_is_read() -> None:
    model, measured = tiny("llama"), Memo()
    found = []
    for tokens in (70, 200):
        study = Study(reading(tokens=tokens).trace, model, measured=measured)
        found.append(TailorKV().preference(study))
    assert torch.equal(found[0], found[1])
    ids = torch.randint(0, model.config.vocab_size, (1024,), generator=torch.Generator().manual_seed(0))
    read = traced(model, Prompt(ids, chat=False)).layers
    want = [dense_preference(layer.queries, layer.keys, layer.scoring, 0.05) for layer in read]
    assert found[0].tolist() == pytest.approx(want, rel=1e-4)
    assert want == pytest.approx(list(of_model(model, None, 0.05, Progress()).values()), rel=1e-4)


def test_dense_layers_are_quantised_whole_and_the_others_lie_in_host_memory() -> None:
    trace = reading(tokens=200).trace
    dense = preferences(trace)
    plan = plan_of(trace, budget=0.4, threshold=between(dense), bits=2)
    testing.check_plan(plan)
    for layer, store in enumerate(plan.stores()):
        near = (plan.tiers[layer] == 1).sum(dim=-1)
        if dense[layer] > between(dense):
            assert isinstance(store, SplitStore) and store.host_nbytes == 0 and bool((near == 16).all())
            packed = store.parts[0]
            assert isinstance(packed, PackedStore) and packed.keys.bits == 2 and packed.keys.axis == "channel"
            assert packed.keys.codes.longest == 184 and packed.values.codes.longest == 184 - 8
        else:
            assert isinstance(store, OffloadStore) and store.host_nbytes > 0 and bool((near > 16).all())
        first, last = plan.tiers[layer, :, :8], plan.tiers[layer, :, -4:]
        assert bool((first == 1).all()) and bool((last == 1).all())


@pytest.mark.parametrize("added", [0, 3])
@pytest.mark.parametrize("uneven", [False, True])
def test_a_query_fetches_the_largest_products_in_its_dominant_channels(uneven: bool, added: int) -> None:
    layer, fetch, channels = reading().trace.layers[1], 5, 4
    others = torch.zeros(2, 70, dtype=torch.bool)
    others[0, 8:60] = True
    others[1, 8 : 40 if uneven else 60] = True
    retriever = ChannelIndex(torch.float32, fetch, channels).build(layer, others)
    far = [[layer.keys[head, i] for i in range(70) if others[head, i]] for head in range(2)]
    peaks = [[max(abs(float(layer.keys[head, i, c])) for i in range(70)) for c in range(16)] for head in range(2)]
    if added:
        new = 2 * torch.randn(2, added, 16, generator=torch.Generator().manual_seed(5))
        retriever = retriever.clone()
        retriever.add(new, new, torch.arange(70, 70 + added).expand(2, -1))
        for head in range(2):
            far[head] += list(new[head])
            peaks[head] = [max(p, *(abs(float(x[c])) for x in new[head])) for c, p in enumerate(peaks[head])]
    query = layer.queries[:, -3:]
    slots, chosen = retriever.find(query, layer.scale)
    for head in range(2):
        for q in range(3):
            mean = [float(sum(query[head * 2 + g, q, c] for g in range(2))) / 2 for c in range(16)]
            dominant = sorted(range(16), key=lambda c: -abs(mean[c]) * peaks[head][c])[:channels]
            scores = [sum(mean[c] * float(key[c]) for c in dominant) for key in far[head]]
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[:fetch]
            assert set(slots[head, q][chosen[head, q]].tolist()) == set(best)


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "gemma3"])
def test_where_no_layer_is_dense_and_everything_is_fetched_nothing_is_lost(architecture: str) -> None:
    session = wb.Session((tiny(architecture), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=45)
    run = session.run(TailorKV(budget=0.7, threshold=1.0, fetch=500), question=ids[:9], max_new_tokens=45)
    assert run.plan.host_nbytes > 0 and run.tokens == full.tokens and run.quality.kl < 1e-8


def test_new_tokens_of_a_quantised_layer_are_exact_until_they_fill_a_group() -> None:
    trace = reading(tokens=200).trace
    plan = plan_of(trace, budget=0.6, threshold=0.0, bits=2)
    store, layer = plan.stores()[0], trace.layers[0]
    assert isinstance(store, SplitStore)
    packed = store.parts[0]
    assert isinstance(packed, PackedStore)
    tail, draw = packed.key_tail.longest, torch.Generator().manual_seed(2)
    given = torch.randn(2, 40, 16, generator=draw).bfloat16()
    for step in range(40):
        store.append(given[:, step : step + 1], given[:, step : step + 1], torch.tensor([200 + step]))
        store.attend(layer.queries[:, -1:].bfloat16(), torch.tensor([200 + step]), layer.scoring)
        held = store.contents(torch.bfloat16)
        for head in range(2):
            at = int((held.positions[head] == 200 + step).nonzero())
            assert torch.equal(held.keys[head, at], given[head, step])
        assert packed.key_tail.longest <= 8 and packed.value_tail.longest <= 9
    assert [row.tolist() for row in store.positions] == [list(range(240))] * 2
    assert packed.keys.codes.longest + packed.key_tail.longest == 240 - int((plan.tiers[0, 0] == 1).sum())
    assert tail < 8


@pytest.mark.parametrize("dense", [[0.9, 0.1, 0.1], [0.1, 0.1, 0.1], [0.9, 0.9, 0.9], [0.1, 0.9, 0.9]])
def test_the_budget_goes_to_the_residual_then_to_sparse_layers_then_to_dense_ones(dense: list[float]) -> None:
    tokens, heads, residual = 100, 2, 16
    ranking = Ranking(torch.zeros(3, heads, tokens)).beside(torch.tensor(dense))
    method, quantised = TailorKV(residual=residual), [p > 0.2 for p in dense]
    before = [0, 0, 0]
    for each in range(1, tokens + 1):
        counts = method.allocate(ranking, each * 3 * heads)
        rows = counts[:, 0].tolist()
        assert bool((counts == counts[:, :1]).all()) and sum(rows) == each * 3 and min(rows) >= 1
        for count, is_dense, was in zip(rows, quantised, before, strict=True):
            assert count >= was
            if is_dense and not all(quantised) and min(rows[i] for i in range(3) if not quantised[i]) < tokens:
                assert count == min(each, residual)
        before = rows
    assert before == [tokens] * 3


def test_bits_follow_from_what_the_quantised_layers_may_take() -> None:
    trace = reading(tokens=200).trace
    with pytest.raises(wb.errors.BudgetTooSmall) as refusal:
        plan_of(trace, budget=0.05, threshold=0.0)
    smallest = refusal.value.smallest
    forms = [plan_of(trace, budget=budget, threshold=0.0).format for budget in (0.95, smallest)]
    assert [form.bits for form in forms if isinstance(form, TailoredFormat)] == [2, 1]
    two = plan_of(trace, budget=0.95, threshold=0.0, bits=2)
    with pytest.raises(wb.errors.BudgetTooSmall) as refusal:
        plan_of(trace, budget=0.05, threshold=0.0, bits=2)
    assert smallest < refusal.value.smallest < two.share


@pytest.mark.parametrize("others", [[SnapKV(budget=0.3, window=8)], [SnapKV(budget=0.3, window=8), AdaKV(window=8)]])
def test_other_methods_may_choose_what_stays_exact(others: list[KVMethod]) -> None:
    found = reading(tokens=200)
    tailor = TailorKV(threshold=between(preferences(found.trace)), group=8, residual=16)
    plan = make_plan(found.trace, [*others, tailor], torch.bfloat16)
    testing.check_plan(plan)
    assert plan.stages.score is others[0] and plan.stages.store is tailor
    assert plan.stages.allocate is (others[1] if len(others) > 1 else tailor)
    assert plan.host_nbytes > 0
