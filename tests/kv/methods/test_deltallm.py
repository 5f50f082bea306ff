"""DeltaLLM: keys as a sequence of deltas that stays close, exact nearby, in the bytes it claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kv.support import tiers_of, trace_of
from workbench.errors import BudgetTooSmall
from workbench.examples import needle
from workbench.kv import AdaKV, DeltaLLM, Mustafar, SnapKV
from workbench.kv.stores.delta import DeltaFormat, DeltaStore, count_of, deltas
from workbench.kv.stores.format import DenseFormat, Shape
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace
from workbench_kernels import Scoring, unpack
from workbench_kernels.rows import restored

if TYPE_CHECKING:
    import workbench as wb

TOKENS = 200
FORMS = (
    DeltaFormat(torch.bfloat16, 0.6, None, 16, 8),
    DeltaFormat(torch.bfloat16, 0.7, 0.49, 8, 0),
    DeltaFormat(torch.bfloat16, 0.33, 0.9, 5, 3),
)
COUNTS = [[60, 60], [60, 41], [5, 52], [33, 33], [1, 9], [0, 60], [8, 24]]


def drifting(blocks: int, group: int, width: int, seed: int) -> Tensor:
    """Rows of which some channels move slowly and others jump."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randn(blocks, group, width, generator=draw) * torch.rand(width, generator=draw)
    return steps.cumsum(dim=1)


def drifting_layer(tokens: int = 60, key_width: int = 20, value_width: int = 18) -> LayerTrace:
    keys, values = drifting(2, tokens, key_width, 0), drifting(2, tokens, value_width, 1)
    queries = torch.randn(4, tokens, key_width, generator=torch.Generator().manual_seed(2))
    return LayerTrace(0, keys, values, queries, torch.device("cpu"), Scoring(key_width**-0.5))


def by_hand(x: Tensor, threshold: float) -> tuple[Tensor, int]:
    """One block [g, d], number by number: what the deltas stand for, and how many of them are not zero."""
    held, moved = x.clone(), 0
    for channel in range(x.shape[1]):
        last = x[0, channel]
        for token in range(1, x.shape[0]):
            if abs(float(x[token, channel] - last)) > threshold:
                last, moved = x[token, channel], moved + 1
            held[token, channel] = last
    return held, moved


# -- the deltas


@given(st.integers(1, 4), st.integers(2, 12), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_restored_rows_are_those_of_the_rule_number_by_number(
    blocks: int, group: int, width: int, zeros: float, seed: int
) -> None:
    x, count = drifting(blocks, group, width, seed), count_of(width, group, zeros)
    numbers, bits, threshold = deltas(x, count)
    assert numbers.shape == (blocks, width + count)
    got = restored(numbers, bits, width, group)
    for block in range(blocks):
        want, moved = by_hand(x[block], float(threshold[block]))
        assert torch.equal(got[block], want)
        assert moved == int(unpack(bits, 1, width * (group - 1))[block].sum()) <= count


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_no_number_is_further_off_than_its_blocks_threshold(zeros: float, seed: int) -> None:
    # The reference is what was restored, so that small deltas in one direction cannot add up.
    x = drifting(3, 32, 8, seed) + torch.arange(32)[:, None] * 0.01
    numbers, bits, threshold = deltas(x, count_of(8, 32, zeros))
    error = (restored(numbers, bits, 8, 32) - x).abs().amax(dim=(1, 2))
    assert bool((error <= threshold).all())


def test_rows_that_repeat_cost_nothing_and_are_exact() -> None:
    x = drifting(2, 1, 6, 0).repeat_interleave(20, dim=1)
    numbers, bits, threshold = deltas(x, 3)
    assert not bits.any() and not threshold.any() and not numbers[:, 6:].any()
    assert torch.equal(restored(numbers, bits, 6, 20), x)


def test_room_for_every_change_is_exact() -> None:
    x = drifting(2, 20, 6, 0)
    numbers, bits, threshold = deltas(x, count_of(6, 20, 0.0))
    assert not threshold.any() and torch.equal(restored(numbers, bits, 6, 20), x)


@pytest.mark.parametrize("zeros", [0.3, 0.6, 0.8])
def test_the_room_for_changes_is_used(zeros: float) -> None:
    x, count = drifting(40, 64, 32, 5), count_of(32, 64, zeros)
    _, bits, _ = deltas(x, count)
    used = unpack(bits, 1, 32 * 63).sum(dim=1).float() / count
    assert float(used.mean()) > 0.95 and float(used.max()) <= 1


def test_more_room_means_a_smaller_threshold_and_error() -> None:
    x = drifting(10, 64, 16, 5)
    errors, thresholds = [], []
    for zeros in (0.2, 0.4, 0.6, 0.8, 0.95):
        numbers, bits, threshold = deltas(x, count_of(16, 64, zeros))
        errors.append(float((restored(numbers, bits, 16, 64) - x).norm()))
        thresholds.append(float(threshold.mean()))
    assert errors == sorted(errors) and thresholds == sorted(thresholds)


# -- the store


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_predicted_bytes_are_live_bytes_for_any_number_kept(form: DeltaFormat, counts: list[int]) -> None:
    tiers = tiers_of(counts)
    store = form.build(drifting_layer(), tiers, None)
    assert store.nbytes == form.nbytes(Shape(2, 60, 20, 18, 2), torch.tensor([counts]))
    assert [row.tolist() for row in store.positions] == [row.nonzero()[:, 0].tolist() for row in tiers]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_each_head_holds_its_blocks_and_then_its_window(form: DeltaFormat, counts: list[int]) -> None:
    layer, tiers = drifting_layer(), tiers_of(counts)
    held = form.build(layer, tiers, None).contents(torch.float32)
    for x, zeros, got in ((layer.keys, form.keys, held.keys), (layer.values, form.values, held.values)):
        for head, count in enumerate(counts):
            rows = x[head, tiers[head] > 0].bfloat16()
            old = 0 if zeros is None else max(count - form.window, 0) // form.group * form.group
            blocks = rows[:old].view(-1, form.group, rows.shape[1])
            for index, block in enumerate(blocks):
                _, _, threshold = deltas(block[None], count_of(rows.shape[1], form.group, zeros or 0))
                want, _ = by_hand(block.float(), float(threshold))
                assert torch.equal(got[head, index * form.group : (index + 1) * form.group], want)
            assert torch.equal(got[head, old:count], rows[old:].float())


@pytest.mark.parametrize("counts", [[60, 60], [47, 21], [3, 60]])
@pytest.mark.parametrize("form", FORMS)
def test_answer_tokens_are_exact_until_a_whole_block_leaves_the_window(form: DeltaFormat, counts: list[int]) -> None:
    layer = drifting_layer()
    store = form.build(layer, tiers_of(counts), None)
    store.reserve(50)
    twin, before = store.clone(), [row.tolist() for row in store.positions]
    untouched = twin.contents(torch.float32)
    keys, values = drifting(2, 50, 20, 7), drifting(2, 50, 18, 8)
    for step in range(50):
        at = slice(step, step + 1)
        store.append(keys[:, at], values[:, at], torch.tensor([60 + step]))
        held = store.contents(torch.float32)
        for head, count in enumerate(counts):
            slot = count + step
            near = max(0, slot + 1 - max(form.window, 1))
            past = torch.arange(near, slot + 1)
            past = past[past >= count]
            newest = keys[head, past - count].bfloat16().float()
            if form.window:
                assert torch.equal(held.keys[head, past], newest)
                assert torch.equal(held.values[head, past], values[head, past - count].bfloat16().float())
    assert [row.tolist() for row in store.positions] == [[*row, *range(60, 110)] for row in before]
    assert [row.tolist() for row in twin.positions] == before
    assert torch.equal(twin.contents(torch.float32).keys, untouched.keys)
    assert isinstance(store, DeltaStore) and store.keys.moves is not None
    assert int(store.keys.tail.counts.min()) < form.window + form.group
    for head, count in enumerate(counts):
        error = (held.keys[head, count : count + 50] - keys[head]).norm() / keys[head].norm()
        assert error < 0.6


def test_an_answer_is_held_as_the_same_tokens_would_be_in_the_prompt() -> None:
    layer, form = drifting_layer(112), DeltaFormat(torch.bfloat16, 0.6, 0.5, 16, 0)
    everything = torch.ones(2, 112, dtype=torch.uint8)
    want = form.build(layer, everything, None)
    first = LayerTrace(0, layer.keys[:, :48], layer.values[:, :48], layer.queries[:, :48], layer.device, layer.scoring)
    store = form.build(first, everything[:, :48], None)
    for begin in range(48, 112, 16):
        at = slice(begin, begin + 16)
        store.append(layer.keys[:, at], layer.values[:, at], torch.arange(begin, begin + 16))
    got, right = store.contents(torch.float32), want.contents(torch.float32)
    assert torch.equal(got.keys, right.keys) and torch.equal(got.values, right.values)


def test_scores_are_exact_in_the_window_and_those_of_restored_keys_before_it() -> None:
    layer, form = trace_of(tokens=TOKENS).layers[1], DeltaFormat(torch.float32, 0.6, None, 16, 40)
    store = form.build(layer, torch.ones(2, TOKENS, dtype=torch.uint8), None)
    query = layer.queries[:, -1:]
    _, weights = store.attend(query, torch.tensor([TOKENS]), layer.scoring, weights=True)
    assert weights is not None
    old = (TOKENS - 40) // 16 * 16
    for head in range(2):
        keys = layer.keys[head].clone()
        for begin in range(0, old, 16):
            block = keys[begin : begin + 16]
            _, _, threshold = deltas(block[None], count_of(16, 16, 0.6))
            keys[begin : begin + 16], _ = by_hand(block, float(threshold))
        for group in range(2):
            exact = layer.keys[head] @ query[2 * head + group, 0] * layer.scale
            scores = keys @ query[2 * head + group, 0] * layer.scale
            assert torch.equal(scores[old:], exact[old:]) and not torch.allclose(scores[:old], exact[:old], atol=1e-3)
            assert torch.allclose(weights[head, group, 0], scores.softmax(dim=0), atol=1e-5)


def test_a_querys_products_can_be_summed_over_the_deltas_alone() -> None:
    # What the paper saves: q . k_t = q . k_(t-1) + q . delta_t, where zeros are never multiplied.
    x, query = drifting(1, 32, 16, 0).double(), torch.randn(16, dtype=torch.double)
    numbers, bits, _ = deltas(x, count_of(16, 32, 0.6))
    held = restored(numbers, bits, 16, 32)[0]
    change = held.diff(dim=0, prepend=torch.zeros(1, 16))
    products = int((change != 0).sum())
    assert products <= 16 + count_of(16, 32, 0.6)
    assert torch.allclose((change @ query).cumsum(dim=0), held @ query)


# -- the method


def test_without_a_budget_keys_alone_have_sixty_percent_of_zeros() -> None:
    plan = make_plan(trace_of(tokens=TOKENS), [DeltaLLM()], torch.bfloat16)
    assert plan.format == DeltaFormat(torch.bfloat16, 0.6, None, 64, 32)
    store = plan.store(trace_of(tokens=TOKENS).layers[0])
    assert isinstance(store, DeltaStore) and store.values.moves is None


def test_a_smaller_budget_takes_more_zeros_and_then_the_values_too() -> None:
    forms = [
        make_plan(trace_of(tokens=TOKENS), [DeltaLLM(budget=budget, group=16, window=16)], torch.bfloat16).format
        for budget in (1.0, 0.95, 0.85, 0.7, 0.5, 0.35)
    ]
    assert forms[0] == DenseFormat(torch.bfloat16)
    shares = [form.keys for form in forms[1:] if isinstance(form, DeltaFormat)]
    assert len(shares) == 5 and shares == sorted(shares)
    values = [form.values for form in forms[1:] if isinstance(form, DeltaFormat)]
    assert values[0] is None and values[-1] is not None and values[-1] < shares[-1]


def test_with_the_values_whole_it_says_what_it_can() -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(trace_of(tokens=TOKENS), [DeltaLLM(values=False, budget=0.4, group=16)], torch.bfloat16)
    assert 0.5 < refusal.value.smallest < 0.62
    plan = make_plan(
        trace_of(tokens=TOKENS), [DeltaLLM(values=False, budget=refusal.value.smallest, group=16)], torch.bfloat16
    )
    assert plan.nbytes <= refusal.value.smallest * plan.full_nbytes


def test_a_fixed_share_shortens_the_window_for_a_budget() -> None:
    windows = []
    for budget in (0.85, 0.8, 0.77):
        form = make_plan(
            trace_of(tokens=TOKENS), [DeltaLLM(sparsity=70, window=128, group=16, budget=budget)], torch.bfloat16
        ).format
        assert isinstance(form, DeltaFormat) and form.keys == 0.7 and form.values is None
        windows.append(form.window)
    assert windows == sorted(windows, reverse=True) and windows[0] > windows[-1]


def test_it_stores_what_others_select() -> None:
    methods = [SnapKV(budget=0.5, window=8), AdaKV(), DeltaLLM(group=16, window=8)]
    plan = make_plan(trace_of(tokens=TOKENS), methods, torch.bfloat16)
    stores = plan.stores()
    assert sum(store.nbytes for store in stores) == plan.nbytes
    assert plan.nbytes < make_plan(trace_of(tokens=TOKENS), methods[:2], torch.bfloat16).nbytes
    assert len({len(row) for store in stores for row in store.positions}) > 2


@pytest.mark.model
def test_on_a_real_model_zeros_cost_little_by_little_and_less_than_small_numbers_do(
    default_session: wb.Session,
) -> None:
    default_session.read(needle(512).text)
    errors = [
        float(default_session.plan(DeltaLLM(window=16, budget=budget)).error.mean()) for budget in (0.9, 0.75, 0.5)
    ]
    assert errors == sorted(errors) and errors[0] < 0.06
    # Dropping each row's smallest numbers keeps nothing of what neighbours have in common.
    assert errors[1] < float(default_session.plan(Mustafar(recent=16, budget=0.75)).error.mean())
