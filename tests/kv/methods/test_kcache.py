"""KCache: exact scores over all keys, and only the values with the largest weights."""

from __future__ import annotations

import math

import pytest
import torch

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench.kv import AdaKV, KCache, SnapKV
from workbench.kv.stores.host_values import HostValuesStore
from workbench.models import tiny
from workbench.runtime.planning import make_plan


@pytest.mark.parametrize("fetch", [1, 5])
def test_what_comes_out_is_the_softmax_over_all_keys_times_the_largest_few_and_near_values(fetch: int) -> None:
    trace = reading().trace
    plan = make_plan(trace, [KCache(budget=0.7, fetch=fetch)], torch.float32)
    layer, store = trace.layers[1], plan.stores()[1]
    assert isinstance(store, HostValuesStore)
    query = layer.queries[:, -3:]
    got, _ = store.attend(query, torch.tensor([67, 68, 69]), layer.scoring)
    for q, at in enumerate((67, 68, 69)):
        for k in range(layer.kv_heads):
            weights = {}
            for g in range(layer.groups):
                head = k * layer.groups + g
                logits = [float(query[head, q] @ layer.keys[k, i]) * layer.scale for i in range(at + 1)]
                total = sum(math.exp(x - max(logits)) for x in logits)
                weights[head] = [math.exp(x - max(logits)) / total for x in logits]
            away = [i for i in range(at + 1) if plan.tiers[1, k, i] == 2]
            fetched = sorted(away, key=lambda i: -sum(row[i] for row in weights.values()))[:fetch]
            for head, row in weights.items():
                here = [i for i in range(at + 1) if plan.tiers[1, k, i] == 1 or i in fetched]
                want = sum(row[i] * layer.values[k, i] for i in here)
                assert torch.allclose(got[head, q], want, atol=1e-5)


@pytest.mark.parametrize("recipe", [[], [SnapKV(window=8), AdaKV(window=8)]])
def test_fetching_every_value_is_exact_whichever_stay(recipe: list[wb.kv.SnapKV]) -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:20], max_new_tokens=50)
    run = session.run([*recipe, KCache(fetch=1000)], budget=0.8, question=ids[:20], max_new_tokens=50)
    assert run.plan.host_nbytes > 0 and run.tokens == full.tokens and run.quality.kl < 1e-8


def test_half_of_the_cache_is_its_keys_and_less_is_refused() -> None:
    found = reading()
    with pytest.raises(wb.errors.BudgetTooSmall) as refusal:
        make_plan(found.trace, [KCache(budget=0.4)], torch.bfloat16)
    assert 0.5 < refusal.value.smallest < 0.65
