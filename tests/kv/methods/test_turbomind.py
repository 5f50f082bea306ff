"""TurboMind: keys and values at any pair of precisions, one scale and zero for each token and head."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kv.support import random_layer, trace_of
from workbench.errors import BudgetTooSmall
from workbench.examples import example
from workbench.kv import KIVI, AdaKV, SnapKV, TurboMind
from workbench.kv.stores import DenseStore, PackedStore
from workbench.kv.stores.format import DenseFormat, Format, PackedFormat, Shape
from workbench.runtime.planning import make_plan
from workbench_kernels import Scoring

if TYPE_CHECKING:
    import workbench as wb
    from workbench.trace import Trace

BITS = (16, 8, 4, 2)
PAIRS = list(product(BITS, BITS))


@pytest.fixture
def trace() -> Trace:
    return trace_of(tokens=120)


def bits_of(form: Format) -> tuple[int, int]:
    if isinstance(form, DenseFormat):
        return 16, 16
    assert isinstance(form, PackedFormat)
    return form.bits, form.value_bits or form.bits


def rounded(x: Tensor, bits: int) -> Tensor:
    """One token of one head, by the formula: zero is its minimum, the scale reaches its maximum in 2^bits - 1 steps."""
    if bits == 16:
        return x
    low, high = min(x.tolist()), max(x.tolist())
    zero = torch.tensor(low, dtype=torch.float16).float()
    scale = ((high - zero) / (2**bits - 1)).to(torch.float16).float()
    levels = [min(max(round(float((number - zero) / scale)), 0), 2**bits - 1) for number in x]
    return torch.tensor([float(zero + level * scale) for level in levels])


@pytest.mark.parametrize(("key_bits", "value_bits"), PAIRS)
def test_each_token_and_head_is_rounded_between_its_own_extremes(key_bits: int, value_bits: int, trace: Trace) -> None:
    plan = make_plan(trace, [TurboMind(key_bits=key_bits, value_bits=value_bits)], torch.float32)
    layer = trace.layers[1]
    held = plan.store(layer).contents(torch.float32)
    for head in range(layer.kv_heads):
        for token in (0, 1, 57, 119):
            for got, x, bits in (
                (held.keys, layer.keys, key_bits),
                (held.values, layer.values, value_bits),
            ):
                torch.testing.assert_close(got[head, token], rounded(x[head, token], bits), atol=1e-5, rtol=0)


@given(
    pair=st.sampled_from(PAIRS),
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=2),
    widths=st.tuples(st.integers(4, 40), st.integers(4, 40)),
)
def test_bytes_of_any_pair_are_predicted(pair: tuple[int, int], counts: list[int], widths: tuple[int, int]) -> None:
    form = PackedFormat(torch.bfloat16, pair[0], max(widths), 0, "token", value_bits=pair[1])
    keep = torch.arange(40) < torch.tensor(counts)[:, None]
    store = form.build(random_layer(40, *widths), keep.to(torch.uint8), None)
    assert store.nbytes == form.nbytes(Shape(2, 40, *widths, 2), torch.tensor([counts]))
    assert [row.numel() for row in store.positions] == counts


@pytest.mark.parametrize(("key_bits", "value_bits"), [(8, 4), (2, 8), (16, 4), (4, 16)])
def test_new_tokens_are_rounded_once_they_have_attended(key_bits: int, value_bits: int) -> None:
    layer = random_layer(30, 16, 16)
    form = PackedFormat(torch.float32, key_bits, 16, 0, "token", value_bits=value_bits)
    store = form.build(layer, torch.ones(2, 30, dtype=torch.uint8), None)
    assert isinstance(store, PackedStore)
    before = store.nbytes
    draw = torch.Generator().manual_seed(1)
    for at in range(30, 45):
        keys, values, queries = (torch.randn(heads, 1, 16, generator=draw) for heads in (2, 2, 4))
        held = store.contents(torch.float32)
        store.append(keys, values, torch.tensor([at]))
        out, _ = store.attend(queries, torch.tensor([at]), Scoring(0.25))
        for head in range(4):
            weights = (torch.cat([held.keys[head // 2], keys[head // 2]]) @ queries[head, 0] * 0.25).softmax(0)
            wanted = weights @ torch.cat([held.values[head // 2], values[head // 2]])  # itself exactly
            torch.testing.assert_close(out[head, 0], wanted, atol=1e-5, rtol=0)
        now = store.contents(torch.float32)
        for got, x, bits in ((now.keys, keys, key_bits), (now.values, values, value_bits)):
            torch.testing.assert_close(got[1, -1], rounded(x[1, 0], bits), atol=1e-5, rtol=0)
    whole = sum(tail.longest for tail in (store.key_tail, store.value_tail))
    assert whole == (45 if 16 in (key_bits, value_bits) else 0)
    assert store.nbytes > before


def test_a_budget_takes_bits_from_the_values_before_the_keys(trace: Trace) -> None:
    found = []
    for hundredths in range(100, 10, -1):
        try:
            plan = make_plan(trace, [TurboMind(budget=hundredths / 100)], torch.bfloat16)
        except BudgetTooSmall:
            break
        assert sum(store.nbytes for store in plan.stores()) == plan.nbytes <= plan.full_nbytes * hundredths / 100
        found.append(bits_of(plan.format))
    order = list(dict.fromkeys(found))
    assert order == [(16, 16), (16, 8), (8, 8), (8, 4), (4, 4), (4, 2), (2, 2)]


def test_a_side_that_is_fixed_stays_and_the_other_gets_what_is_left(trace: Trace) -> None:
    for budget, key_bits, value_bits in ((1.0, 16, 2), (0.6, 8, 2), (0.4, 4, 2)):
        plan = make_plan(trace, [TurboMind(value_bits=2, budget=budget)], torch.bfloat16)
        assert bits_of(plan.format) == (key_bits, value_bits)
    with pytest.raises(BudgetTooSmall):
        make_plan(trace, [TurboMind(key_bits=16, value_bits=16, budget=0.9)], torch.bfloat16)
    assert bits_of(make_plan(trace, [TurboMind()], torch.bfloat16).format) == (4, 4)


def test_more_bits_of_either_side_are_closer(trace: Trace) -> None:
    def error(key_bits: int, value_bits: int) -> float:
        method = TurboMind(key_bits=key_bits, value_bits=value_bits)
        return float(make_plan(trace, [method], torch.float32).error.mean())

    for fewer, more in pairwise(reversed(BITS)):
        assert error(16, fewer) > error(16, more)
        assert error(fewer, 16) > error(more, 16)
    assert error(16, 16) < 1e-5


def test_nothing_quantised_is_the_plain_cache(trace: Trace) -> None:
    plan = make_plan(trace, [TurboMind(key_bits=16, value_bits=16)], torch.bfloat16)
    assert plan.nbytes == plan.full_nbytes
    assert all(isinstance(store, DenseStore) for store in plan.stores())


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "names"),
    [(8, 4, {"8-bit", "4-bit"}), (4, 4, {"4-bit"}), (16, 2, {"bfloat16", "2-bit"}), (2, 16, {"bfloat16", "2-bit"})],
)
def test_bytes_are_told_by_precision(key_bits: int, value_bits: int, names: set[str], trace: Trace) -> None:
    plan = make_plan(
        trace, [SnapKV(budget=0.5, window=8), TurboMind(key_bits=key_bits, value_bits=value_bits)], torch.bfloat16
    )
    store = plan.store(trace.layers[0])
    sizes = {name: sum(x.nbytes for x in tensors) for name, tensors in store.tensors().items()}
    assert {name for name, nbytes in sizes.items() if nbytes} == names
    assert sum(sizes.values()) == store.nbytes
    each = {16: "bfloat16"}
    named = [each.get(bits, f"{bits}-bit") for bits in (key_bits, value_bits)]
    assert plan.precisions == (named[0] if len(set(named)) == 1 else f"{named[0]} keys, {named[1]} values",)


def test_heads_of_different_lengths_are_quantised_alike(trace: Trace) -> None:
    methods = [SnapKV(budget=0.4, window=8), AdaKV(), TurboMind(key_bits=8, value_bits=4)]
    plan = make_plan(trace, methods, torch.float32)
    layer = trace.layers[1]
    store = plan.store(layer)
    held = store.contents(torch.float32)
    assert len({len(places) for places in store.positions}) > 1
    for head, places in enumerate(store.positions):
        for slot in (0, len(places) - 1):
            wanted = rounded(layer.keys[head, int(places[slot])], 8)
            torch.testing.assert_close(held.keys[head, slot], wanted, atol=1e-5, rtol=0)


def test_keys_need_the_bits_more_than_values_do(default_session: wb.Session) -> None:
    # What the order of "auto" rests on; per token, keys suffer more than by KIVI's groups along a channel.
    default_session.read(example("dialogue").text[:1500])

    def error(method: object) -> float:
        return float(default_session.plan(method).error.mean())

    keys, values = error(TurboMind(key_bits=8, value_bits=4)), error(TurboMind(key_bits=4, value_bits=8))
    assert keys < 0.5 * values
    assert error(KIVI(bits=4, residual=0)) < error(TurboMind(key_bits=4, value_bits=4))
