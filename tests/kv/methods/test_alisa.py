"""ALISA: the newest tokens and those with most attention in the latest steps, fetched from host memory."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from tests.kv.support import ids_of, reading
from workbench import testing
from workbench.errors import NotApplicable
from workbench.kv import ALISA, AdaKV, SnapKV
from workbench.kv.stores import DenseStore
from workbench.kv.stores.eight_bit import EightBitOffloadStore, to_bytes, to_numbers
from workbench.kv.stores.format import DenseFormat
from workbench.kv.stores.offload import OffloadStore
from workbench.kv.stores.recomputed import RecomputedRows
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan

if TYPE_CHECKING:
    from workbench.kv.plan import Plan
    from workbench.trace import LayerTrace


def plan_of(dtype: torch.dtype = torch.float32, tokens: int = 70, **parameters: Any) -> Plan:
    return make_plan(reading(tokens=tokens).trace, [ALISA(**parameters)], dtype)


def softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def half(x: float) -> float:
    return float(torch.tensor(x).half())


def prompt_rows(layer: LayerTrace, steps: int) -> list[dict[int, float]]:
    """For each of the last queries what it gave to each position, summed over all heads."""
    rows = []
    for at in range(layer.tokens - steps, layer.tokens):
        row = dict.fromkeys(range(at + 1), 0.0)
        for head in range(layer.heads):
            keys = layer.keys[head // layer.groups]
            given = softmax([float(layer.queries[head, at] @ keys[i]) * layer.scale for i in range(at + 1)])
            for i, weight in enumerate(given):
                row[i] += weight
        rows.append({i: half(x) for i, x in row.items()})
    return rows


@pytest.mark.parametrize("steps", [1, 5, 64, 0])
def test_every_step_follows_algorithm_1(steps: int) -> None:
    plan = plan_of(budget=0.2, bits=16, steps=steps)
    layer, store = plan.trace.layers[1], plan.stores()[1]
    assert isinstance(store, OffloadStore)
    n, k = layer.tokens, store.near.longest
    assert all(plan.tiers[1, head].tolist() == [2] * (n - k) + [1] * k for head in range(layer.kv_heads))
    keys = [{i: layer.keys[head, i] for i in range(n)} for head in range(layer.kv_heads)]
    values = [{i: layer.values[head, i] for i in range(n)} for head in range(layer.kv_heads)]
    kept = min(steps or k, k)
    rows = deque(prompt_rows(layer, kept), maxlen=kept)
    first_near, draw, fetched = n - k, torch.Generator().manual_seed(3), []
    for at in range(n, n + 45):
        new = torch.randn(layer.kv_heads, 1, keys[0][0].numel(), generator=draw)
        query = 3 * torch.randn(layer.heads, 1, new.shape[2], generator=draw)
        for head in range(layer.kv_heads):
            keys[head][at] = values[head][at] = new[head, 0]
        if at + 1 - first_near > k + 32:  # the window has grown by 32: the oldest leave it
            first_near = at + 1 - k
        store.append(new, new, torch.tensor([at]))
        got, _ = store.attend(query, torch.tensor([at]), layer.scoring)

        sums = {i: sum(row.get(i, 0.0) for row in rows) for i in range(first_near)}
        dynamic = sorted(sums, key=lambda i: -sums[i])[:k]
        fetched.append(set(dynamic))
        row = dict.fromkeys(range(at + 1), 0.0)
        for head in range(layer.heads):
            group = head // layer.groups
            attended = [*dynamic, *range(first_near, at + 1)]
            given = softmax([float(query[head, 0] @ keys[group][i]) * layer.scale for i in attended])
            want = sum(w * values[group][i] for i, w in zip(attended, given, strict=True))
            assert torch.allclose(got[head, 0], want, atol=1e-5), at  # type: ignore[arg-type]
            for i, weight in zip(attended, given, strict=True):
                row[i] += weight
        rows.append({i: half(x) for i, x in row.items()})
    assert len(set(map(frozenset, fetched))) > 1 and max(fetched[-1]) >= n - k  # some left the window and came back


def test_as_many_are_fetched_as_are_near_and_the_sum_is_shared_by_all_heads() -> None:
    plan = plan_of(budget=0.2, bits=16)
    for store in plan.stores():
        assert isinstance(store, OffloadStore)
        slots, chosen = store.retriever.find(torch.randn(4, 3, 16), 1.0)
        assert bool(chosen.all()) and slots.shape == (2, 3, store.near.longest)
        assert torch.equal(slots[0].sort().values, slots[1].sort().values)


def test_with_half_the_cache_on_the_device_nothing_is_left_out() -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    full = session.run(question=ids[:9], max_new_tokens=20)
    run = session.run(ALISA(budget=0.55, bits=16), question=ids[:9], max_new_tokens=20)
    assert run.plan.host_nbytes > 0.4 * run.plan.full_nbytes
    assert run.tokens == full.tokens and run.quality.kl < 1e-8
    eight = session.run(ALISA(budget=0.2), question=ids[:9], max_new_tokens=20)
    assert eight.quality.kl > 0


@pytest.mark.parametrize(("bits", "size"), [(16, 2 * 4 * 16), (8, 2 * (16 + 4))])
def test_what_is_recomputed_gives_the_same_answers_and_is_not_held(bits: Any, size: int) -> None:
    session = wb.Session((tiny("llama"), None), kv_dtype="float32")
    ids = ids_of(70, 1)
    session.read(ids)
    held = session.run(ALISA(budget=0.2, bits=bits), question=ids[:9], max_new_tokens=12)
    again = session.run(ALISA(budget=0.2, recompute=0.75, bits=bits), question=ids[:9], max_new_tokens=12)
    assert held.tokens == again.tokens and held.plan.nbytes == again.plan.nbytes
    assert again.quality.kl == pytest.approx(held.quality.kl, rel=1e-3, abs=1e-9)
    saved = 0
    for store, plain in zip(again.plan.stores(), held.plan.stores(), strict=True):
        assert isinstance(store, OffloadStore) and isinstance(store.far, RecomputedRows)
        assert torch.equal(store.tiers(70), plain.tiers(70))
        far = 70 - store.near.longest
        saved += 2 * int(0.75 * far) * size - 2 * 8  # how many are deleted is two numbers
        one, other = store.contents(torch.float32), plain.contents(torch.float32)
        assert torch.allclose(one.keys, other.keys, atol=1e-5) and torch.allclose(one.values, other.values, atol=1e-5)
    assert saved > 0 and held.plan.host_nbytes - again.plan.host_nbytes == saved
    assert sum(store.host_nbytes for store in again.plan.stores()) == again.plan.host_nbytes


def test_recomputed_rows_are_let_go_when_the_layer_has_attended() -> None:
    model, trace = tiny("llama"), reading(tokens=70).trace
    plan = make_plan(trace, [ALISA(budget=0.2, recompute=0.9)], torch.float32, model=model)
    stores = plan.stores()
    deleted = int(0.9 * (70 - stores[0].near.longest))  # type: ignore[attr-defined]
    decoder = Decoder(model, stores, 70)
    for step in range(3):
        decoder.feed(torch.tensor([step]))
        for store in stores:
            assert isinstance(store, OffloadStore) and isinstance(store.far, RecomputedRows)
            assert store.far.recomputer.tokens == deleted and not store.far.recomputer._rows
    with pytest.raises(NotApplicable, match="read again"):
        plan_of(budget=0.2, recompute=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_within_half_a_step_and_stay_the_same_bytes_wherever_they_go(dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = to_bytes(x)
    assert rows.dtype == torch.uint8 and rows.shape == (3, 11, 20)
    step = (x.float().amax(-1) - x.float().amin(-1)) / 255
    assert bool(((to_numbers(rows, torch.float32) - x.float()).abs() <= 0.52 * step[..., None] + 2e-3).all())

    store = plan_of(dtype, budget=0.3).stores()[0]
    assert isinstance(store, EightBitOffloadStore)
    assert store.near.keys.data.dtype == store.far.keys.data.dtype == torch.uint8
    assert set(store.nbytes_by_precision) == {"8-bit", "index"} == set(store.host_nbytes_by_precision)

    def held() -> dict[tuple[int, int], list[float]]:
        found = store.contents(torch.float32)
        return {
            (head, int(at)): found.keys[head, slot].tolist()
            for head, row in enumerate(found.positions.expand(2, -1))
            for slot, at in enumerate(row)
        }

    before, far = held(), store.far.longest
    draw = torch.Generator().manual_seed(4)
    for at in range(70, 110):
        new = torch.randn(2, 1, 16, generator=draw).to(dtype)
        store.append(new, new, torch.tensor([at]))
    assert store.far.longest > far
    after = held()
    assert len(after) == 2 * 110 and all(after[place] == numbers for place, numbers in before.items())


def test_everything_that_fits_stays_as_it_is() -> None:
    plan = plan_of(torch.bfloat16, budget=1.0)
    assert isinstance(plan.format, DenseFormat) and plan.keeps_all
    assert all(isinstance(store, DenseStore) for store in plan.stores())


@pytest.mark.parametrize("bits", [8, 16])
def test_another_method_may_choose_what_is_near(bits: int) -> None:
    found = reading()
    methods = [SnapKV(budget=0.3, window=8), AdaKV(window=8), ALISA(bits=bits)]
    plan = make_plan(found.trace, methods, torch.bfloat16)
    testing.check_plan(plan)
    for layer, store in zip(found.trace.layers, plan.stores(), strict=True):
        assert isinstance(store, OffloadStore)
        query: Tensor = layer.queries[:, -1:]
        _, chosen = store.retriever.find(query, layer.scale)
        near = (plan.tiers[layer.index] == 1).sum(dim=-1)
        assert torch.equal(chosen[:, 0].sum(dim=-1), near.clamp(max=70 - near))
