"""Methods that store less of every token: narrow keys, sparse rows, two quantised tiers, one bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kv.support import ids_of, random_layer, tiers_of, trace_of
from workbench.errors import BadBudget, BadParameter, BudgetTooSmall
from workbench.kv import KIVI, AdaKV, MiKV, Mustafar, SnapKV, ThinK, VisualKV1Bit, ZipCache
from workbench.kv.fitting import pruning_steps
from workbench.kv.stores import DenseStore, PackedStore, SplitStore, Store
from workbench.kv.stores.bitmap import BitmapFormat, BitmapStore, SparseRows
from workbench.kv.stores.calibrated import CalibratedFormat, lowered
from workbench.kv.stores.format import DenseFormat, Format, MixedFormat, PackedFormat, Shape, balancer
from workbench.kv.stores.frozen import FrozenStore
from workbench.kv.stores.mixed import MixedStore, weakest
from workbench.kv.stores.pruned import PrunedFormat, PrunedStore, channel_scores
from workbench.kv.stores.salient import SalientFormat, channel_factors
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring, dequantise, pack, quantise, unpack
from workbench_kernels.building import sparse_rows

TOKENS = 90
FORMATS: dict[str, Format] = {
    "narrow keys": PrunedFormat(torch.bfloat16, 0.4, recent=8, queries=8),
    "sparse rows": BitmapFormat(torch.bfloat16, 0.7, recent=8),
    "two tiers": SalientFormat(torch.bfloat16, 4, 2),
    "one bit": CalibratedFormat(torch.bfloat16, 1, 0.5, 0.3, drop=0.0, start=5, length=None, recent=8),
}


def tiers_for(form: Format, counts: list[int]) -> Tensor:
    """Counts [k] of 60 positions in tier 1, the others where the format has them."""
    return tiers_of(counts, rest=2 if form.keeps_rest else 0)


def softmax_attention(layer: LayerTrace, keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
    """One query [h, d] over keys [k, n, d], values [k, n, dv], head by head."""
    groups = query.shape[0] // keys.shape[0]
    rows = [
        (keys[head // groups] @ query[head] * layer.scale).softmax(dim=0) @ values[head // groups]
        for head in range(query.shape[0])
    ]
    return torch.stack(rows)


# -- what every format promises


@pytest.mark.parametrize("counts", [[60, 60], [60, 41], [5, 52], [33, 33], [1, 9], [0, 60]])
@pytest.mark.parametrize("name", FORMATS)
def test_predicted_bytes_are_live_bytes_for_any_number_kept(name: str, counts: list[int]) -> None:
    # Traps 1 and 2: savings that no allocation shows.
    layer, form = random_layer(), FORMATS[name]
    store = form.build(layer, tiers_for(form, counts), None)
    assert store.nbytes == form.nbytes(Shape(2, 60, 20, 18, 2), torch.tensor([counts]))
    tiers = tiers_for(form, counts)
    assert [row.tolist() for row in store.positions] == [row.nonzero()[:, 0].tolist() for row in tiers]


@pytest.mark.parametrize("name", FORMATS)
def test_several_layers_are_predicted_as_each_is_held(name: str) -> None:
    layer, form = random_layer(), FORMATS[name]
    counts = [[60, 60], [60, 17], [30, 30]]
    held = sum(form.build(layer, tiers_for(form, row), None).nbytes for row in counts)
    assert held == form.nbytes(Shape(2, 60, 20, 18, 2), torch.tensor(counts))


@pytest.mark.parametrize("counts", [[60, 60], [47, 21], [3, 60]])
@pytest.mark.parametrize("name", FORMATS)
def test_new_tokens_enter_exactly_and_a_copy_is_independent(name: str, counts: list[int]) -> None:
    layer, form = random_layer(), FORMATS[name]
    store = form.build(layer, tiers_for(form, counts), None)
    store.reserve(3)
    twin = store.clone()
    before = [row.tolist() for row in store.positions]
    draw = torch.Generator().manual_seed(9)
    keys, values = (torch.randn(2, 4, x.shape[-1], generator=draw) for x in (layer.keys, layer.values))
    for step in range(4):
        at = slice(step, step + 1)
        store.append(keys[:, at], values[:, at], torch.tensor([60 + step]))
    assert [row.tolist() for row in store.positions] == [[*row, 60, 61, 62, 63] for row in before]
    assert [row.tolist() for row in twin.positions] == before
    held = store.contents(torch.float32)
    rows = held.positions.expand(2, -1)
    for head in range(2):
        for step in range(4):
            slot = int((rows[head] == 60 + step).nonzero()[0, 0])
            assert torch.equal(held.keys[head, slot], keys[head, step].bfloat16().float())
            assert torch.equal(held.values[head, slot], values[head, step].bfloat16().float())


@pytest.mark.parametrize("counts", [[60, 60], [47, 21]])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_that_over_what_the_store_holds(name: str, softcap: float | None, counts: list[int]) -> None:
    # Causal rows and windows by true positions, not by slots (trap 8); the narrow keys are never widened, the others
    # are: both must agree with the plain rule over what is held.
    layer, form = random_layer(), FORMATS[name]
    store = form.build(layer, tiers_for(form, counts), None)
    positions = torch.tensor([57, 59, 64])
    query = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(4))
    for window in (None, 50):
        got, weights = store.attend(query, positions, Scoring(0.3, window, softcap), weights=True)
        assert weights is not None
        held = store.contents(torch.float32)
        for head in range(4):
            for q, position in enumerate(positions.tolist()):
                where = held.positions.expand(2, -1)[head // 2]
                seen = (where <= position) & (where > position - (window or 10**6))
                if held.valid is not None:
                    seen &= held.valid[head // 2]
                logits = held.keys[head // 2, seen] @ query[head, q] * 0.3
                if softcap:
                    logits = torch.tanh(logits / softcap) * softcap
                probs = logits.softmax(dim=0)
                assert torch.allclose(got[head, q], probs @ held.values[head // 2, seen], atol=1e-5)
                assert torch.allclose(weights[head // 2, head % 2, q, seen], probs, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mqa", "gemma3"])
@pytest.mark.parametrize("method", [ThinK(), Mustafar(), ZipCache(budget=0.5), VisualKV1Bit()])
def test_a_model_decodes_on_the_store_and_its_bytes_grow_by_new_tokens_only(method: Any, architecture: str) -> None:
    trace, model = trace_of(architecture, TOKENS), tiny(architecture)
    plan = make_plan(trace, [method], torch.bfloat16)
    decoder = Decoder(model, plan.stores(), TOKENS)
    assert sum(store.nbytes for store in decoder.stores) == plan.nbytes < plan.full_nbytes
    for step in range(6):
        logits = decoder.feed(torch.tensor([(7 * step + 3) % 256]))
        assert bool(logits.isfinite().all())
    full = [store for store in decoder.stores if store.positions[0][0] == 0]
    assert full and all(row[-1] == TOKENS + 5 for store in full for row in store.positions)


@pytest.mark.parametrize("store", [ThinK(), Mustafar(), VisualKV1Bit(recent=4), ZipCache()])
def test_a_store_combines_with_any_selection_and_division(store: Any) -> None:
    trace = trace_of(tokens=TOKENS)
    plan = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV(), store], torch.bfloat16)
    assert sum(held.nbytes for held in plan.stores()) == plan.nbytes
    alone = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV()], torch.bfloat16)
    assert torch.equal(plan.tiers == 1, alone.tiers == 1)
    if not plan.format.keeps_rest:
        assert plan.nbytes < alone.nbytes


def test_methods_that_keep_every_token_refuse_a_number_of_tokens() -> None:
    for method in (ThinK, Mustafar, VisualKV1Bit):
        with pytest.raises(BadBudget, match="keeps every token"):
            make_plan(trace_of(tokens=TOKENS), [method(budget="20 tokens")], torch.bfloat16)


@pytest.mark.parametrize("method", [ThinK, Mustafar, ZipCache, VisualKV1Bit])
def test_a_larger_budget_is_never_further_off(method: Any) -> None:
    errors = [
        float(make_plan(trace_of(tokens=TOKENS), [method(budget=budget)], torch.bfloat16).error.mean())
        for budget in (0.6, 0.8, 1.0)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.004 < errors[0]


# -- ThinK


def test_think_scores_channels_by_the_norm_of_their_outer_product() -> None:
    layer, window = trace_of(tokens=TOKENS).layers[1], 8
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[1, 10:30] = False
    got = channel_scores(layer, keep, window)
    for head in range(2):
        for channel in range(16):
            total = 0.0
            for query in (2 * head, 2 * head + 1):
                asked = layer.queries[query, -window:, channel].double()
                keys = layer.keys[head, keep[head], channel].double()
                total += float(torch.outer(asked, keys).square().sum())
            assert float(got[head, channel]) == pytest.approx(total**0.5, rel=1e-5)


def test_think_attends_with_the_best_channels_of_old_keys_and_all_of_recent_ones() -> None:
    layer, trace = trace_of(tokens=TOKENS).layers[1], trace_of(tokens=TOKENS)
    method = ThinK(pruned=50, window=8, recent=10)
    store = make_plan(trace, [method], torch.float32).store(layer)
    assert isinstance(store, PrunedStore)
    assert store.older[0].view().shape == (2, TOKENS - 10, 8) and store.newer[0].view().shape == (2, 10, 16)
    scores = channel_scores(layer, torch.ones(2, TOKENS, dtype=torch.bool), 8)
    keys = layer.keys.clone()
    for head in range(2):
        worst = scores[head].argsort()[:8]
        keys[head, : TOKENS - 10, worst] = 0
        assert set(store.channels[head].tolist()) == set(range(16)) - set(worst.tolist())
    query = layer.queries[:, -1]
    got, _ = store.attend(query[:, None], torch.tensor([TOKENS]), layer.scoring)
    assert torch.allclose(got[:, 0], softmax_attention(layer, keys, layer.values, query), atol=1e-5)


def test_think_keeps_what_queries_ask_for_where_the_largest_keys_are_not_asked_for() -> None:
    # Query-driven: a channel with large keys that no query looks at goes first.
    base = random_layer(60, 16, 16)
    keys, queries = base.keys.clone(), base.queries.clone()
    keys[:, :, 3] *= 20
    queries[:, :, 3] *= 1e-4
    layer = LayerTrace(0, keys, base.values, queries, base.device, base.scoring)
    store = PrunedFormat(torch.float32, 0.5, 0, 8).build(layer, torch.ones(2, 60, dtype=torch.uint8), None)
    assert isinstance(store, PrunedStore) and 3 not in store.channels


def test_think_alone_halves_the_cache_at_most_and_says_what_it_can() -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(trace_of(tokens=TOKENS), [ThinK(budget=0.4)], torch.bfloat16)
    assert 0.5 < refusal.value.smallest < 0.6
    default = make_plan(trace_of(tokens=TOKENS), [ThinK(recent=0)], torch.bfloat16)
    assert default.format == PrunedFormat(torch.bfloat16, 0.4, 0, 32) and 0.8 < default.share < 0.84


def test_think_with_a_fixed_share_shortens_its_window_for_a_budget() -> None:
    recents = []
    for budget in (0.9, 0.82, 0.77):
        form = make_plan(trace_of(tokens=TOKENS), [ThinK(pruned=50, recent=64, budget=budget)], torch.bfloat16).format
        assert isinstance(form, PrunedFormat) and form.pruned == 0.5
        recents.append(form.recent)
    assert recents == sorted(recents, reverse=True) and recents[0] > recents[-1]


# -- Mustafar


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 6), st.integers(0, 2**31))
def test_sparse_rows_come_back_with_only_their_largest_numbers(width: int, count: int, rows: int, seed: int) -> None:
    count = min(count, width)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x[:, ::3] = 0
    numbers, bitmap = sparse_rows(x[None], count, x.dtype)
    assert numbers.shape == (rows, count) and bitmap.shape == (rows, -(-width // 8))
    back = SparseRows.of(x, torch.tensor([rows]), count, torch.float32).expanded(torch.float32)
    for row, found in zip(x, back, strict=True):
        ranked = sorted(row.tolist(), key=abs, reverse=True)
        assert sorted(map(abs, found.tolist()), reverse=True) == pytest.approx(
            [abs(v) for v in ranked[:count]] + [0] * (width - count)
        )
        assert bool(((found == row) | (found == 0)).all())


def test_mustafar_zeroes_the_smallest_numbers_of_each_old_token() -> None:
    trace = trace_of(tokens=TOKENS)
    layer = trace.layers[1]
    plan = make_plan(trace, [Mustafar(sparsity=70, recent=10)], torch.float32)
    store = plan.store(layer)
    assert isinstance(store, BitmapStore)
    held = store.contents(torch.float32)
    for whole, got in ((layer.keys, held.keys), (layer.values, held.values)):
        for head in range(2):
            for token in range(TOKENS):
                expected = whole[head, token].clone()
                if token < TOKENS - 10:
                    smallest = sorted(range(16), key=lambda c: abs(float(expected[c])))[:11]  # int(0.7 * 16)
                    expected[smallest] = 0
                assert torch.equal(got[head, token], expected)
    assert store.keys.numbers.data.shape == (2 * (TOKENS - 10), 5) and store.keys.bitmap.data.shape[1] == 2


def test_mustafar_prunes_tokens_as_they_leave_the_window_while_decoding() -> None:
    layer = random_layer(30, 16, 16)
    store = BitmapFormat(torch.float32, 0.5, recent=4).build(layer, torch.ones(2, 30, dtype=torch.uint8), None)
    assert isinstance(store, BitmapStore)
    new = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(2))
    for first, last in ((0, 1), (1, 6), (6, 7)):
        store.append(new[:, first:last], new[:, first:last], torch.arange(30 + first, 30 + last))
    nonzero = (store.contents(torch.float32).keys != 0).sum(dim=-1)
    assert nonzero.tolist() == [[8] * 33 + [16] * 4] * 2


def test_a_bitmap_costs_one_bit_a_channel() -> None:
    shape, all_kept = Shape(1, 1000, 64, 64, 2), torch.tensor([[1000]])
    assert BitmapFormat(torch.bfloat16, 0.7, 0).nbytes(shape, all_kept) == 1000 * 2 * (20 * 2 + 8)


def test_unstructured_pruning_loses_less_than_pruned_channels() -> None:
    # The paper's comparison: the same share of the keys' numbers, chosen token by token or channel by channel.
    for layer in trace_of(tokens=TOKENS).layers:
        tiers, positions = torch.ones(2, TOKENS, dtype=torch.uint8), torch.arange(TOKENS - 16, TOKENS)
        query = layer.queries[:, -16:]
        exact = DenseFormat(torch.float32).build(layer, tiers, None).attend(query, positions, layer.scoring)[0]
        channels = PrunedFormat(torch.float32, 0.5, 0, 16).build(layer, tiers, None)
        keys = BitmapFormat(torch.float32, 0.5, 0).build(layer, tiers, None).contents(torch.float32).keys
        every = torch.ones(2, TOKENS, dtype=torch.bool)
        sparse_keys = DenseStore.where(keys, layer.values, every, torch.float32)
        structured, unstructured = (
            float((store.attend(query, positions, layer.scoring)[0] - exact).norm())
            for store in (channels, sparse_keys)
        )
        assert unstructured < structured


def test_steps_prune_mildly_before_they_give_up_the_window() -> None:
    steps = list(pruning_steps(10, 4))
    assert steps[:8] == [(share / 10, 4) for share in range(1, 9)] and steps[8] == (0.1, 2)
    assert steps[-1] == (0.9, 0) and [window for _, window in steps] == sorted((w for _, w in steps), reverse=True)


# -- ZipCache


def test_zipcache_scores_by_the_mean_attention_of_probes_that_see_a_token() -> None:
    layer, method = trace_of(tokens=TOKENS).layers[1], ZipCache(recent_probes=0.1, random_probes=0.1, seed=5)
    probes = method.probes(TOKENS).tolist()
    assert probes[-9:] == list(range(TOKENS - 9, TOKENS)) and len(probes) == 18
    got = method.score(layer)
    for head in range(2):
        total = torch.zeros(TOKENS, dtype=torch.float64)
        for query in (2 * head, 2 * head + 1):
            for probe in probes:
                keys = layer.keys[head, : probe + 1].double()
                row = (keys @ layer.queries[query, probe].double() * layer.scale).softmax(dim=0)
                total[: probe + 1] += row / 2
        seen = torch.tensor([sum(probe >= position for probe in probes) for position in range(TOKENS)])
        assert torch.allclose(got[head], (total / seen).float(), atol=1e-6)


def test_normalised_scores_do_not_favour_early_tokens() -> None:
    # Section 4.2: where every query attends evenly to all it sees, a sum ranks tokens by age; the mean does not
    # punish the last ones.
    layer = LayerTrace(
        0, torch.zeros(1, 40, 8), torch.zeros(1, 40, 8), torch.zeros(1, 40, 8), torch.device("cpu"), Scoring(1.0)
    )
    score = ZipCache(recent_probes=1.0, random_probes=0.0).score(layer)[0]
    assert float(score[-1]) == pytest.approx(1 / 40) and float(score[0]) == pytest.approx(
        sum(1 / n for n in range(1, 41)) / 40
    )
    received = layer.received()[0]
    assert float(score[-1] / score[0]) > 5 * float(received[-1] / received[0])


def test_the_draw_of_probes_depends_on_the_seed_alone() -> None:
    assert torch.equal(ZipCache().probes(500), ZipCache().probes(500))
    assert not torch.equal(ZipCache(seed=1).probes(500), ZipCache().probes(500))
    for tokens in (1, 2, 7, 500):
        probes = ZipCache(random_probes=1.0).probes(tokens)
        assert int(probes[-1]) == tokens - 1 and bool((probes.diff() > 0).all())


def test_zipcache_rounds_keys_by_channel_and_values_by_token_behind_channel_factors() -> None:
    layer, form = random_layer(), SalientFormat(torch.float32, 4, 2)
    tiers = tiers_for(form, [25, 40])
    held = form.build(layer, tiers, None).contents(torch.float32)
    rows = held.positions.expand(2, -1)
    assert held.valid is not None
    for head in range(2):
        where = {int(rows[head, slot]): slot for slot in held.valid[head].nonzero()[:, 0].tolist()}
        assert sorted(where) == list(range(60))
        for tier, steps in ((1, 15), (2, 3)):
            members = (tiers[head] == tier).nonzero()[:, 0].tolist()
            keys, values = layer.keys[head, members], layer.values[head, members]
            roots = [max(abs(float(v)) for v in values[:, c]) ** 0.5 for c in range(18)]
            for row, position in enumerate(members):
                got_key, got_value = held.keys[head, where[position]], held.values[head, where[position]]
                for channel in range(20):
                    low, high = float(keys[:, channel].min()), float(keys[:, channel].max())
                    step = (high - low) / steps
                    expected = low + round((float(keys[row, channel]) - low) / step) * step
                    near = float(got_key[channel]) == pytest.approx(expected, abs=0.01)
                    # A number half way between two levels may fall to either.
                    assert near or abs(float(got_key[channel] - keys[row, channel])) < step * 0.51
                scaled = [float(values[row, c]) / roots[c] for c in range(18)]
                step = (max(scaled) - min(scaled)) / steps
                for channel in range(18):
                    expected = (min(scaled) + round((scaled[channel] - min(scaled)) / step) * step) * roots[channel]
                    near = float(got_value[channel]) == pytest.approx(expected, abs=0.01)
                    assert near or abs(float(got_value[channel] - values[row, channel])) < step * roots[channel] * 0.51


def test_channel_factors_protect_values_from_outlier_channels() -> None:
    # Section 4.1: token-wise rounding alone spends its levels on the outlier.
    values = random_layer(200, 16, 16).values.clone()
    values[:, :, 4] *= 50
    keep = torch.ones(2, 200, dtype=torch.bool)
    factors = channel_factors(values, keep)[:, None].float()
    others = [c for c in range(16) if c != 4]

    def error(factor: Tensor) -> float:
        back = dequantise(*quantise(values * factor, 4)) / factor
        return float((back - values)[..., others].norm() / values[..., others].norm())

    assert error(factors) < 0.4 * error(torch.ones_like(factors))


def test_zipcache_spends_its_budget_on_bits_then_on_salient_tokens() -> None:
    trace = trace_of(tokens=TOKENS)
    forms, shares = [], []
    for budget in (0.24, 0.3, 0.4, 0.5, 1.0):
        plan = make_plan(trace, [ZipCache(budget=budget)], torch.bfloat16)
        assert bool((plan.counts == TOKENS).all()) and plan.nbytes <= budget * plan.full_nbytes
        forms.append(plan.precisions)
        shares.append(float((plan.tiers == 1).float().mean()))
    assert forms == [("4-bit", "2-bit")] * 2 + [("8-bit", "4-bit")] * 2 + [("bfloat16",)]
    assert 0 < shares[0] < shares[1] and 0 < shares[2] < shares[3] and shares[4] == 1


def test_zipcache_marks_the_tokens_it_scores_highest() -> None:
    trace, method = trace_of(tokens=TOKENS), ZipCache(bits="4/2", budget="30 tokens")
    plan = make_plan(trace, [method], torch.bfloat16)
    for layer in trace.layers:
        best = method.score(layer).topk(30, dim=-1).indices
        for head in range(2):
            assert set((plan.tiers[layer.index, head] == 1).nonzero()[:, 0].tolist()) == set(best[head].tolist())


@pytest.mark.parametrize("cut", [0, 40])  # nothing salient, and some
def test_what_comes_is_quantised_with_everything_else_once_there_is_enough(cut: int) -> None:
    layer, form = random_layer(), SalientFormat(torch.float32, 4, 2, gap=5)
    tiers = torch.full((2, 60), 2, dtype=torch.uint8)
    tiers[:, :cut] = 1
    store = form.build(layer, tiers, None)
    share, generator = cut / 60, torch.Generator().manual_seed(1)
    held = store.contents(torch.float32)
    known = [
        {
            int(held.positions.expand(2, -1)[h, s]): (held.keys[h, s], held.values[h, s])
            for s in range(held.keys.shape[1])
            if held.valid is None or bool(held.valid[h, s])
        }
        for h in range(2)
    ]
    high = [{p for p in range(60) if tiers[h, p] == 1} for h in range(2)]
    for step in range(11):
        key, value = torch.randn(2, 1, 20, generator=generator), torch.randn(2, 1, 18, generator=generator)
        query, position = torch.randn(4, 1, 20, generator=generator), 60 + step
        store.append(key, value, torch.tensor([position]))
        twin = store.clone()
        for h in range(2):
            known[h][position] = (key[h, 0], value[h, 0])
        out, _ = store.attend(query, torch.tensor([position]), Scoring(0.3))
        for h in range(2):
            keys = torch.stack([known[h][p][0] for p in range(position + 1)])
            values = torch.stack([known[h][p][1] for p in range(position + 1)])
            rows = [(keys @ query[2 * h + g, 0] * 0.3).softmax(dim=0) for g in range(2)]
            assert torch.allclose(out[2 * h : 2 * h + 2, 0], torch.stack([row @ values for row in rows]), atol=1e-4)
            if (step + 1) % 5 == 0:
                given = {p: float(rows[0][p] + rows[1][p]) for p in range(position - 4, position + 1)}
                high[h] |= set(sorted(given, key=lambda p: -given[p])[: int(share * 5 + 0.5)])
        assert torch.equal(twin.attend(query, torch.tensor([position]), Scoring(0.3))[0], out)
        if (step + 1) % 5 == 0:
            joined = [
                torch.stack([torch.stack([known[h][p][i] for p in range(position + 1)]) for h in range(2)])
                for i in (0, 1)
            ]
            tiers = torch.tensor([[1 if p in high[h] else 2 for p in range(position + 1)] for h in range(2)])
            again = replace(layer, keys_held=joined[0], values_held=joined[1])
            fresh = form.build(again, tiers.to(torch.uint8), None)
            want, got = fresh.contents(torch.float32), store.contents(torch.float32)
            assert torch.equal(want.positions, got.positions)
            assert torch.allclose(want.keys, got.keys, atol=1e-5)
            assert torch.allclose(want.values, got.values, atol=1e-5)
            assert fresh.nbytes_by_precision["2-bit"] == store.nbytes_by_precision["2-bit"]
            for h in range(2):
                real = range(got.keys.shape[1]) if got.valid is None else got.valid[h].nonzero()[:, 0].tolist()
                known[h] = {int(got.positions.expand(2, -1)[h, s]): (got.keys[h, s], got.values[h, s]) for s in real}
    assert [row.tolist() for row in store.positions] == [list(range(71))] * 2


# -- one bit


@given(st.integers(1, 70), st.integers(0, 9), st.integers(0, 2**31))
def test_single_bits_come_back_as_they_were(channels: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2, (rows, channels), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, 1)
    assert packed.shape == (rows, -(-channels // 8)) and torch.equal(unpack(packed, 1, channels), codes)


def test_one_bit_rounds_to_the_nearer_of_two_ends() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    back = dequantise(*quantise(x, 1))
    for row, found in zip(x.double(), back, strict=True):
        low, high = row.min(), row.max()
        expected = torch.where((row - low).abs() < (row - high).abs(), low, high)
        assert torch.allclose(found.double(), expected, atol=4e-3)


def test_only_the_given_stretch_is_at_one_bit_with_two_levels_a_channel() -> None:
    layer, trace = trace_of(tokens=TOKENS).layers[1], trace_of(tokens=TOKENS)
    method = VisualKV1Bit(start=7, length=37, key_share=0.4, value_share=0.25)
    held = make_plan(trace, [method], torch.float32).store(layer).contents(torch.float32)
    rows = held.positions.expand(2, -1)
    for whole, got, share in ((layer.keys, held.keys, 0.4), (layer.values, held.values, 0.25)):
        for head in range(2):
            ordered = got[head][rows[head].argsort()]
            for position in [*range(7), *range(44, TOKENS)]:
                assert torch.equal(ordered[position], whole[head, position])
            for channel in range(16):
                numbers = whole[head, 7:44, channel]
                low, high = share * numbers.min(), share * numbers.max()
                expected = torch.where((numbers - low).abs() < (numbers - high).abs(), low, high)
                assert torch.allclose(ordered[7:44, channel], expected, atol=2e-3)


def test_scores_of_the_stretch_are_drawn_together_and_no_others() -> None:
    # By the formula of the authors' code: (s - min) / (max - min) * (max - 3 - min) + min, for each query and head.
    layer = random_layer()
    form = CalibratedFormat(torch.float32, 1, 0.5, 0.3, drop=3.0, start=5, length=30, recent=0)
    store = form.build(layer, tiers_for(form, [60, 60]), None)
    query = 3 * torch.randn(4, 2, 20, generator=torch.Generator().manual_seed(4))
    got, weights = store.attend(query, torch.tensor([57, 64]), Scoring(1.0), weights=True)
    assert weights is not None
    held = store.contents(torch.float32)
    where = held.positions.expand(2, -1)
    for head in range(4):
        for q, position in enumerate((57, 64)):
            scores = held.keys[head // 2] @ query[head, q]
            inside = (where[head // 2] >= 5) & (where[head // 2] < 35)
            low, high = scores[inside].min(), scores[inside].max()
            assert high - low > 3
            scores[inside] = (scores[inside] - low) / (high - low) * (high - 3 - low) + low
            expected = scores.masked_fill(where[head // 2] > position, -torch.inf).softmax(dim=0)
            assert torch.allclose(weights[head // 2, head % 2, q], expected, atol=1e-6)
            assert torch.allclose(got[head, q], expected @ held.values[head // 2], atol=1e-5)


def test_lowered_scores_keep_their_order_and_what_is_hidden() -> None:
    scores = torch.tensor([[0.0, 4.0, 2.0, -torch.inf], [1.0, 2.0, 1.5, -torch.inf], [5.0, -torch.inf, 5.0, 5.0]])
    expected = torch.tensor([[0.0, 1.0, 0.5, -torch.inf], [1.0, 1.0, 1.0, -torch.inf], [5.0, -torch.inf, 5.0, 5.0]])
    assert torch.allclose(lowered(scores, 3.0), expected)
    assert torch.equal(lowered(torch.full((2, 5), -torch.inf), 3.0), torch.full((2, 5), -torch.inf))


@pytest.mark.parametrize("tokens", [512, 8192])
def test_a_stretch_is_sixteen_times_smaller_but_for_two_numbers_a_channel(tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, tokens, 64, generator=draw).bfloat16()
    layer = LayerTrace(0, keys, values, keys, torch.device("cpu"), Scoring(0.125))
    form = VisualKV1Bit(length=tokens).store(torch.bfloat16, [Shape(2, tokens, 64, 64, 2)], None)
    store = form.build(layer, torch.ones(2, tokens, dtype=torch.uint8), None)
    full = keys.nbytes + values.nbytes
    assert store.nbytes == full // 16 + 2 * 2 * (64 + 64) * 2
    assert full / store.nbytes == pytest.approx(16 * tokens / (tokens + 32))


def test_without_a_stretch_all_but_the_newest_tokens_are_at_one_bit() -> None:
    plan = make_plan(trace_of(tokens=TOKENS), [VisualKV1Bit(recent=10)], torch.bfloat16)
    store = plan.store(trace_of(tokens=TOKENS).layers[0])
    assert isinstance(store, SplitStore)
    settled = store.parts[1]
    assert isinstance(settled, FrozenStore) and settled.positions[0].tolist() == list(range(80))
    with pytest.raises(NotImplementedError):
        settled.append(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16), torch.tensor([TOKENS]))


def test_a_budget_leaves_as_many_newest_tokens_exact_as_fit() -> None:
    lengths = []
    for budget in (0.5, 0.7, 0.9):
        plan = make_plan(trace_of(tokens=TOKENS), [VisualKV1Bit(budget=budget)], torch.bfloat16)
        form = plan.format
        assert isinstance(form, CalibratedFormat)
        longer = replace(form, recent=form.recent + 1)
        counts = torch.full((3, 2), TOKENS)
        assert plan.nbytes == form.nbytes(Shape(2, TOKENS, 16, 16, 2), counts) <= budget * plan.full_nbytes
        assert longer.nbytes(Shape(2, TOKENS, 16, 16, 2), counts) > budget * plan.full_nbytes
        lengths.append(form.recent)
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_parameters_out_of_bounds_are_refused() -> None:
    refused: list[tuple[Any, dict[str, Any]]] = [
        (VisualKV1Bit, {"key_share": 0.0}),
        (VisualKV1Bit, {"bits": 3}),
        (VisualKV1Bit, {"start": -1}),
        (ThinK, {"pruned": 45}),
        (Mustafar, {"sparsity": 100}),
        (ZipCache, {"bits": "2/4"}),
    ]
    for method, wrong in refused:
        with pytest.raises(BadParameter):
            method(**wrong)


def test_a_store_reports_its_bytes_by_precision() -> None:
    names: dict[str, set[str]] = {}
    for name, form in FORMATS.items():
        store: Store = form.build(random_layer(), tiers_for(form, [50, 50]), None)
        names[name] = {precision for precision, size in store.nbytes_by_precision.items() if size}
    assert names == {
        "narrow keys": {"bfloat16"},
        "sparse rows": {"bfloat16", "bfloat16 with bitmap"},
        "two tiers": {"4-bit", "2-bit"},
        "one bit": {"bfloat16", "1-bit"},
    }


# -- KIVI


def rounded_group(x: Tensor, bits: int) -> Tensor:
    """One group as the paper rounds it: between its minimum and maximum, scale and zero float16."""
    zero = x.min().half().float()
    scale = ((x.max() - zero) / (2**bits - 1)).half().float()
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


class PublishedKIVI:
    """One head of the published cache, token by token: what is quantised, what waits, and when it moves."""

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        self.keys, self.values, self.waiting_keys, self.waiting_values = [], [], [], []
        whole = len(keys) - len(keys) % residual
        for begin in range(0, whole, residual):
            self.keys += self.key_block(list(keys[begin : begin + residual]))
        self.waiting_keys = list(keys[whole:])
        old = max(len(values) - residual, 0)
        self.values = [self.value_token(value) for value in values[:old]]
        self.waiting_values = list(values[old:])

    def key_block(self, rows: list[Tensor]) -> list[Tensor]:
        out = torch.stack(rows)
        for begin in range(0, len(rows), self.group):
            for channel in range(out.shape[1]):
                at = slice(begin, begin + self.group)
                out[at, channel] = rounded_group(out[at, channel], self.bits)
        return list(out)

    def value_token(self, row: Tensor) -> Tensor:
        return torch.cat([rounded_group(part, self.bits) for part in row.split(self.group)])

    def step(self, key: Tensor, value: Tensor, query: Tensor, scale: float) -> Tensor:
        self.waiting_keys.append(key)
        self.waiting_values.append(value)
        weights = (torch.stack(self.keys + self.waiting_keys) @ query * scale).softmax(0)
        out = weights @ torch.stack(self.values + self.waiting_values)
        if len(self.waiting_keys) == self.residual:
            self.keys += self.key_block(self.waiting_keys)
            self.waiting_keys = []
        if len(self.waiting_values) > self.residual:
            self.values.append(self.value_token(self.waiting_values.pop(0)))
        return out


@pytest.mark.parametrize(("prompt", "bits"), [(1, 2), (47, 2), (48, 4), (49, 2), (200, 2)])
def test_kivi_decodes_as_the_published_cache_over_hundreds_of_tokens(prompt: int, bits: int) -> None:
    # Trap 5. Outputs too: a token is exact in its own pass, also where that fills the block.
    group, residual, steps = 8, 48, 160
    draw = torch.Generator().manual_seed(prompt)
    keys, values, queries = (torch.randn(2, prompt + steps, 16, generator=draw) for _ in range(3))
    layer = LayerTrace(0, keys[:, :prompt], values[:, :prompt], queries[:, :prompt], torch.device("cpu"), Scoring(0.25))
    form = PackedFormat(torch.float32, bits, group, residual)
    store = form.build(layer, torch.ones(2, prompt, dtype=torch.uint8), None)
    assert isinstance(store, PackedStore)
    heads = [PublishedKIVI(k[:prompt], v[:prompt], bits, group, residual) for k, v in zip(keys, values, strict=True)]
    for at in range(prompt, prompt + steps):
        now = slice(at, at + 1)
        store.append(keys[:, now], values[:, now], torch.tensor([at]))
        out, _ = store.attend(queries[:, now], torch.tensor([at]), Scoring(0.25))
        for head, published in enumerate(heads):
            expected = published.step(keys[head, at], values[head, at], queries[head, at], 0.25)
            assert torch.allclose(out[head, 0], expected, atol=1e-4)
        assert store.keys.codes.longest == len(heads[0].keys) == (at + 1) // residual * residual
        assert store.values.codes.longest == len(heads[0].values) == max(at + 1 - residual, 0)
        if at % 40 == 0 or at == prompt + steps - 1:
            held = store.contents(torch.float32)
            for head, published in enumerate(heads):
                assert torch.allclose(held.keys[head], torch.stack(published.keys + published.waiting_keys), atol=1e-5)
                assert torch.allclose(
                    held.values[head], torch.stack(published.values + published.waiting_values), atol=1e-5
                )


def test_kivi_scales_and_zeros_are_float16_for_any_model() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        store = PackedFormat(dtype, 2, 8, 16).build(random_layer(), torch.ones(2, 60, dtype=torch.uint8), None)
        assert isinstance(store, PackedStore) and store.key_tail.data.dtype == dtype
        for rows in (store.keys, store.values):
            assert rows.scale.data.dtype == rows.zero.data.dtype == torch.float16
    method = KIVI()
    assert (method.group, method.residual) == (32, 128)
    assert method.store(torch.bfloat16, [], None) == PackedFormat(torch.bfloat16, 2, 32, 128)


def test_the_exact_tail_of_kivi_lives_on_through_further_questions() -> None:
    # Trap 4: the residual dropped where something rewrites the cache.
    trace, model = trace_of(tokens=TOKENS), tiny("llama")
    plan = make_plan(trace, [KIVI(bits=2, group=8, residual=32)], torch.float32)
    decoder, whole = (Decoder(model, stores, TOKENS) for stores in (plan.stores(), exact_stores(trace)))
    for turn in range(4):
        asked = ids_of(11, turn)
        twin = decoder.clone()
        assert torch.equal(decoder.feed(asked), twin.feed(asked))
        whole.feed(asked)
        store, exact = decoder.stores[0], whole.stores[0].contents(torch.float32)  # the first layer sees no rounding
        assert isinstance(store, PackedStore)
        total = TOKENS + 11 * (turn + 1)
        assert store.key_tail.longest == total % 32 and store.value_tail.longest == 32
        assert torch.allclose(store.key_tail.view(), exact.keys[:, total - total % 32 :], atol=1e-5)
        assert torch.allclose(store.value_tail.view(), exact.values[:, -32:], atol=1e-5)


def exact_stores(trace: Trace) -> list[Store]:
    every = torch.ones(2, TOKENS, dtype=torch.uint8)
    return [DenseFormat(torch.float32).build(layer, every, None) for layer in trace.layers]


# -- MiKV


def mixed(counts: list[int], *, recent: float = 0.5, balance: bool = True) -> tuple[LayerTrace, MixedStore]:
    layer, form = random_layer(), MixedFormat(torch.float32, 4, 8, balance, recent)
    store = form.build(layer, tiers_for(form, counts), None)
    assert isinstance(store, MixedStore)
    return layer, store


@pytest.mark.parametrize("counts", [[60, 41], [5, 52], [33, 33], [1, 9], [0, 60]])
@pytest.mark.parametrize("balance", [True, False])
def test_mixed_precision_is_predicted_with_what_it_remembers(counts: list[int], balance: bool) -> None:
    layer, store = mixed(counts, balance=balance)
    form = MixedFormat(torch.float32, 4, 8, balance)
    assert store.nbytes == form.nbytes(Shape(2, 60, 20, 18, 4), torch.tensor([counts]))
    assert store.high.state is not None and store.high.state.total == sum(counts)
    whole = form.build(layer, torch.ones(2, 60, dtype=torch.uint8), None)
    assert isinstance(whole, DenseStore) and whole.state is None  # nothing to demote at budget 1
    both = torch.tensor([counts, [60, 60]])
    assert store.nbytes + whole.nbytes == form.nbytes(Shape(2, 60, 20, 18, 4), both)


@pytest.mark.parametrize("counts", [[30, 30], [20, 40], [0, 12]])
@pytest.mark.parametrize("recent", [0.0, 0.5, 1.0])
def test_mikv_demotes_the_least_attended_while_decoding(counts: list[int], recent: float) -> None:
    layer, store = mixed(counts, recent=recent)
    share, begun = sum(counts) / 120, torch.tensor(counts)
    factors = balancer(layer).float()
    mass = [{p: float(layer.received()[head, p]) for p in row} for head, row in enumerate(high_positions(store))]
    draw, truth = torch.Generator().manual_seed(7), [dict[int, Tensor](), dict[int, Tensor]()]
    position = 60
    for count in (1, 1, 1, 5, 1, 1, 13, *[1] * 40):
        keys, values = (torch.randn(2, count, x.shape[-1], generator=draw) for x in (layer.keys, layer.values))
        query, at = torch.randn(4, count, 20, generator=draw), torch.arange(position, position + count)
        store.append(keys, values, at)
        held = store.contents(torch.float32)
        plain = softmax_rows(held, query, at, 0.3)
        out, _ = store.attend(query, at, Scoring(0.3))
        position += count
        for head in range(2):
            mass[head] |= dict.fromkeys(at.tolist(), 0.0)
            truth[head] |= dict(zip(at.tolist(), keys[head], strict=True))
            for group in range(2):
                for q in range(count):
                    probs = plain[2 * head + group][q]
                    for p in mass[head]:
                        mass[head][p] += probs.get(p, 0.0)
            excess = len(mass[head]) - int(begun[head]) - int(share * (position - 60) + 1e-6)
            if excess > 0:
                safe = min(int(recent * len(mass[head]) + 1e-6), len(mass[head]) - excess)
                order = sorted(mass[head])
                free = order[: len(order) - safe]
                for p in sorted(free, key=lambda p: mass[head][p])[:excess]:
                    del mass[head][p]
        assert high_positions(store) == [sorted(kept) for kept in mass]
        assert [row.tolist() for row in store.positions] == [list(range(position))] * 2
        assert out.isfinite().all()
    for head in range(2):
        remembered, slots = store.high.eviction_state, store.high.slot_positions
        assert remembered is not None
        for slot in range(len(mass[head])):
            assert float(remembered[head, slot]) == pytest.approx(
                mass[head][int(slots[head, slot])], rel=1e-3, abs=1e-5
            )
        low = store.low.contents(torch.float32)
        rows, valid = low.positions.expand(2, -1)[head], low.valid
        for slot, p in enumerate(rows.tolist()):
            if p >= 60 and (valid is None or bool(valid[head, slot])):
                scaled = truth[head][p] * factors[head]
                expected = torch.cat([rounded_group(part, 4) for part in scaled.split(8)]) / factors[head]
                assert torch.allclose(low.keys[head, slot], expected, atol=1e-4)


def high_positions(store: MixedStore) -> list[list[int]]:
    return [row.tolist() for row in store.high.positions]


def softmax_rows(held: Any, query: Tensor, at: Tensor, scale: float) -> list[list[dict[int, float]]]:
    """For each head and query, the attention that each position gets."""
    rows = []
    for head in range(4):
        where = held.positions.expand(2, -1)[head // 2]
        real = torch.ones_like(where, dtype=torch.bool) if held.valid is None else held.valid[head // 2]
        found = []
        for q, position in enumerate(at.tolist()):
            seen = (real & (where <= position)).nonzero()[:, 0]
            probs = (held.keys[head // 2, seen] @ query[head, q] * scale).softmax(0)
            found.append(dict(zip(where[seen].tolist(), probs.tolist(), strict=True)))
        rows.append(found)
    return rows


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.7])
def test_the_cache_of_mikv_grows_at_nearly_the_rate_of_its_low_bits(budget: float) -> None:
    trace, model, steps = trace_of(tokens=TOKENS), tiny("llama"), 192
    plan = make_plan(trace, [MiKV(group=16, budget=budget)], torch.bfloat16)
    decoder, share = Decoder(model, plan.stores(), TOKENS), float((plan.tiers == 1).float().mean())
    for step in range(steps):
        decoder.feed(torch.tensor([(7 * step + 3) % 256]))
    important = 0
    for store in decoder.stores:
        assert isinstance(store, MixedStore)
        important += sum(len(row) for row in high_positions(store))
    heads = 2 * len(decoder.stores)
    assert abs(important / (heads * (TOKENS + steps)) - share) < 0.01
    high, low = 32 * 2 + 8, 2 * (4 + 4) + 4  # bytes of an entry: numbers, position and sum; codes, scales and position
    room = 2 * 64 * heads * (high + low)  # rows come in blocks
    grown = sum(store.nbytes for store in decoder.stores) - plan.nbytes
    assert grown <= steps * heads * (share * high + (1 - share) * low) + room
    assert grown < steps * heads * 64  # as an uncompressed cache grows


def test_a_reserved_mixed_cache_moves_nothing_while_it_grows() -> None:
    _, store = mixed([30, 30])
    store.reserve(40)
    size, draw = store.nbytes, torch.Generator().manual_seed(1)
    for step in range(40):
        keys, values = (torch.randn(2, 1, width, generator=draw) for width in (20, 18))
        store.append(keys, values, torch.tensor([60 + step]))
        store.attend(torch.randn(4, 1, 20, generator=draw), torch.tensor([60 + step]), Scoring(0.3))
    assert store.nbytes == size and [len(row) for row in high_positions(store)] == [50, 50]


def test_a_copy_of_a_mixed_cache_goes_its_own_way() -> None:
    _, store = mixed([30, 12])
    new = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(1))
    store.append(new[:, :1], new[:, :1, :18], torch.tensor([60]))
    store.attend(new.repeat(2, 1, 1)[:, :1], torch.tensor([60]), Scoring(0.3))
    twin, before = store.clone(), high_positions(store)
    for other in (twin, store):
        assert high_positions(other) == before
        for step in range(1, 9):
            other.append(new[:, step : step + 1], new[:, step : step + 1, :18], torch.tensor([60 + step]))
            other.attend(new.repeat(2, 1, 1)[:, :1], torch.tensor([60 + step]), Scoring(0.3))
    assert high_positions(twin) == high_positions(store) != before
    assert torch.equal(twin.contents(torch.float32).keys, store.contents(torch.float32).keys)


def test_the_weakest_never_come_from_empty_slots_or_the_newest() -> None:
    mass = torch.tensor([[5.0, 1, 2, 9, 3, 4], [5, 1, 2, torch.inf, torch.inf, torch.inf]])
    positions = torch.tensor([[0, 11, 4, 2, 9, 7], [8, 3, 1, -1, -1, -1]])
    got = weakest(mass, positions, 2, 0.5)
    assert [set(row.tolist()) for row in got] == [{2, 0}, {1, 2}]
    assert [set(row.tolist()) for row in weakest(mass, positions, 3, 1.0)] == [{0, 2, 3}, {0, 1, 2}]


def test_packed_stores_know_their_positions_without_dequantising(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.kv.stores.packed import PackedStore

    keep = torch.ones(2, 70, dtype=torch.bool)
    some = keep.clone()
    some[0, ::3], some[1, 40:] = False, False
    for kept in (keep, some):
        store = PackedStore.where(
            torch.randn(2, 70, 8), torch.randn(2, 70, 8), kept, torch.float32, bits=4, group=8, residual=16
        )
        store.append(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.arange(70, 73))
        with monkeypatch.context() as patched:
            patched.setattr(PackedStore, "contents", lambda *_: pytest.fail("dequantised"))
            found = store.positions
        for head, positions in enumerate(found):
            assert positions.tolist() == [*kept[head].nonzero()[:, 0].tolist(), 70, 71, 72]
