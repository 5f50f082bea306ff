"""FireQ: smoothing along rotary pairs, symmetric integers with FP8 scales, FP8 queries."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kv.support import numbers, trace_of
from workbench.core.rope import Rotation
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.kv import AdaKV, FireQ, SnapKV
from workbench.kv.stores.format import DenseFormat, Shape
from workbench.kv.stores.smoothed import (
    SmoothedFormat,
    SmoothedStore,
    SymmetricRows,
    smoothing,
)
from workbench.models import tiny
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.rotary import rotate
from workbench_kernels.symmetric import rounded_to_fp8

TOKENS = 60


def rotated_layer(key_width: int = 20, value_width: int = 18, rotated: int = 16) -> LayerTrace:
    """Two KV heads of two query heads each; the first `rotated` channels of a key are rotated."""
    keys, values = numbers(2, TOKENS, key_width), numbers(2, TOKENS, value_width, seed=1)
    queries = numbers(4, TOKENS, key_width, seed=2)

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * torch.linspace(1, 0.01, rotated // 2).repeat(2)
        return angles.cos(), angles.sin()

    device, found = torch.device("cpu"), (lambda read: Rotation(rotary)) if rotated else None
    return LayerTrace(0, keys, values, queries, device, Scoring(key_width**-0.5), rotary=found)


def fp8(number: float) -> float:
    """The nearest e4m3 number, ties to even, from its definition: 3 bits of mantissa, exponents from -6 to 8."""
    if number == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(number))), -6) - 3)
    return min(max(round(number / step) * step, -448.0), 448.0)


def rounded(row: list[float], bits: int, group: int, scales: torch.dtype) -> list[float]:
    """One token of one head, group by group, around 0."""
    most, out = 2 ** (bits - 1) - 1, []
    for begin in range(0, len(row), group):
        part = row[begin : begin + group]
        wanted = max(map(abs, part)) / most
        scale = fp8(wanted) if scales.itemsize == 1 else float(torch.tensor(wanted).bfloat16())
        out += [min(max(round(x / scale), -most - 1), most) * scale if scale else 0.0 for x in part]
    return out


# -- smoothing


@pytest.mark.parametrize(("rotated", "outliers"), [(16, 0), (16, 3), (20, 4), (0, 2), (8, 20)])
def test_pairs_share_a_factor_except_the_largest_channels_and_their_partners(rotated: int, outliers: int) -> None:
    keys = numbers(2, TOKENS, 20) * torch.linspace(0.2, 9, 20)
    got = smoothing(keys, rotated, outliers)
    half = rotated // 2
    for head in range(2):
        largest = [max(abs(float(x)) for x in keys[head, :, c]) for c in range(20)]
        partner = [c if c >= rotated else (c + half) % rotated for c in range(20)]
        first = sorted(range(20), key=lambda c: -largest[c])[:outliers]
        alone = {*first, *(partner[c] for c in first)}
        for c in range(20):
            if c in alone or c >= rotated:
                expected = 8 / largest[c]
            else:
                expected = 8 / max(math.hypot(float(row[c]), float(row[partner[c]])) for row in keys[head])
            assert float(got[head, c]) == pytest.approx(expected, rel=1e-3)


def test_a_shared_factor_is_the_same_before_and_after_the_rotation() -> None:
    # Why the pre-RoPE factors may be found, and applied, on rotated keys.
    layer, keys = rotated_layer(16, 16, 16), numbers(2, TOKENS, 16) * torch.linspace(0.2, 9, 16)
    cos, sin = layer.rotation(torch.arange(TOKENS))
    turned = rotate(keys, cos, sin)
    before, after = smoothing(keys, 16, 0).float(), smoothing(turned, 16, 0).float()
    assert torch.allclose(before, after, rtol=2e-3)
    assert torch.equal(before[:, :8], before[:, 8:])
    assert torch.allclose(rotate(keys * before[:, None], cos, sin), turned * before[:, None], atol=1e-4)


def test_a_dead_channel_and_an_empty_pair_are_left_alone() -> None:
    keys = numbers(1, 9, 8)
    keys[:, :, [2, 6, 3]] = 0
    factors = smoothing(keys, 8, 0)
    assert bool(factors.isfinite().all()) and factors[0, 2] == factors[0, 6] == 1 and factors[0, 3] == factors[0, 7]


@pytest.mark.parametrize(("architecture", "rotated"), [("llama", 16), ("phi3", None), ("gemma3", None)])
def test_the_rotated_channels_come_from_the_model(architecture: str, rotated: int | None) -> None:
    layer = trace_of(architecture, 90).layers[1]
    found = layer.rotation.width
    assert 0 < found <= layer.keys.shape[-1] and rotated in (None, found)
    form, keep = SmoothedFormat(4, 16, 2, fp8_query=False), torch.ones(layer.keys.shape[:2], dtype=torch.uint8)
    for held, width in ((layer, found), (replace(layer, rotary=None), 0)):
        store = form.build(held, keep, None)
        assert isinstance(store, SmoothedStore)
        assert torch.equal(store.key_factors, smoothing(layer.keys, width, 2))


def test_smoothing_protects_small_channels_from_outliers() -> None:
    # The paper's reason: a token's scale is spent on its outlier channels.
    base = rotated_layer(16, 16, 16)
    keys = base.keys.clone()
    keys[:, :, [2, 10, 5]] *= 40
    every = torch.full((2,), TOKENS)
    factors = smoothing(keys, 16, 8).float()
    others = [c for c in range(16) if c not in (2, 10, 5)]

    def error(factor: Tensor) -> float:
        back = SymmetricRows.of((keys * factor[:, None]).flatten(0, 1), every, 4, 128, torch.bfloat16).view(
            torch.float32
        )
        return float((back / factor[:, None] - keys)[..., others].norm() / keys[..., others].norm())

    assert error(factors) < 0.3 * error(torch.ones_like(factors))


# -- numbers


def test_fp8_queries_are_the_nearest_of_their_own_scale() -> None:
    x = numbers(3, 5, 17)
    x[0, 0] = 0
    x[1, 1] *= 1e-3
    got = rounded_to_fp8(x)
    for row, found in zip(x.flatten(0, 1).double(), got.flatten(0, 1), strict=True):
        scale = float(row.abs().max()) / 448 or 1.0
        assert found.tolist() == pytest.approx([fp8(v / scale) * scale for v in row.tolist()], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("group", [128, 8, 4])
@pytest.mark.parametrize(("bits", "scales"), [(4, torch.float8_e4m3fn), (4, torch.bfloat16), (8, torch.bfloat16)])
def test_keys_and_values_are_symmetric_integers_for_each_token_and_head(
    bits: int, scales: torch.dtype, group: int
) -> None:
    layer = rotated_layer()
    store = SmoothedFormat(bits, group, 3, False, scales).build(layer, torch.ones(2, TOKENS, dtype=torch.uint8), None)
    new_keys, new_values = numbers(2, 2, 20, seed=5), numbers(2, 2, 18, seed=6)
    store.append(new_keys, new_values, torch.tensor([60, 61]))
    held, factors = store.contents(torch.float32), smoothing(layer.keys, 16, 3).float()
    keys, values = torch.cat([layer.keys, new_keys], 1), torch.cat([layer.values, new_values], 1)
    for head in range(2):
        lift = float(torch.tensor(8 / float(layer.values[head].abs().max())).half())
        for token in range(TOKENS + 2):
            key = rounded((keys[head, token] * factors[head]).tolist(), bits, group, scales)
            value = rounded((values[head, token] * lift).tolist(), bits, group, scales)
            assert torch.allclose(held.keys[head, token], torch.tensor(key) / factors[head], atol=1e-5)
            assert torch.allclose(held.values[head, token], torch.tensor(value) / lift, atol=1e-5)


@pytest.mark.parametrize("fp8_query", [True, False])
@pytest.mark.parametrize("counts", [[60, 60], [41, 20]])
def test_attention_divides_the_queries_by_the_factors_of_the_keys(counts: list[int], fp8_query: bool) -> None:
    layer = rotated_layer()
    keep = torch.arange(TOKENS) < torch.tensor(counts)[:, None]
    store = SmoothedFormat(4, 128, 3, fp8_query).build(layer, keep.to(torch.uint8), None)
    assert isinstance(store, SmoothedStore)
    held, query, positions = store.contents(torch.float32), numbers(4, 3, 20, seed=4), torch.tensor([15, 18, 70])
    for window, softcap in ((None, None), (30, 4.0)):
        got, rows = store.attend(query, positions, Scoring(0.4, window, softcap), weights=True)
        assert rows is not None
        for head in range(4):
            kv = head // 2
            factors = store.key_factors[kv].float()
            for q, position in enumerate(positions.tolist()):
                asked = query[head, q] / factors
                asked = (rounded_to_fp8(asked) if fp8_query else asked) * factors
                seen = [p for p in range(counts[kv]) if p <= position and p > position - (window or 1000)]
                if not seen:
                    continue
                logits = held.keys[kv, seen] @ asked * 0.4
                logits = torch.tanh(logits / softcap) * softcap if softcap else logits
                probs = logits.softmax(0)
                assert torch.allclose(got[head, q], probs @ held.values[kv, seen], atol=1e-5)
                assert torch.allclose(rows[kv, head % 2, q, seen], probs, atol=1e-5)


# -- bytes, copies, budgets


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "group"), [(16, 128), (18, 4), (33, 16)])
def test_predicted_bytes_are_live_bytes(width: int, group: int, bits: int) -> None:
    layer, form = rotated_layer(width, width + 1), SmoothedFormat(bits, group, 8, True)
    for counts in ([60, 60], [60, 41], [33, 33], [0, 60], [1, 9]):
        keep = (torch.arange(TOKENS) < torch.tensor(counts)[:, None]).to(torch.uint8)
        store = form.build(layer, keep, None)
        assert store.nbytes == form.nbytes(Shape(2, TOKENS, width, width + 1, 2), torch.tensor([counts]))
        assert [row.tolist() for row in store.positions] == [list(range(count)) for count in counts]


@pytest.mark.parametrize("counts", [[60, 60], [47, 21]])
def test_copies_are_independent_and_room_is_used(counts: list[int]) -> None:
    layer = rotated_layer()
    keep = (torch.arange(TOKENS) < torch.tensor(counts)[:, None]).to(torch.uint8)
    store = SmoothedFormat(4, 128, 3, True).build(layer, keep, None)
    store.reserve(4)
    size, twin = store.nbytes, store.clone()
    before = [row.tolist() for row in store.positions]
    for step in range(4):
        new = numbers(2, 1, 20, seed=step), numbers(2, 1, 18, seed=step)
        store.append(*new, torch.tensor([60 + step]))
    assert store.nbytes == size == twin.nbytes
    assert [row.tolist() for row in store.positions] == [[*row, 60, 61, 62, 63] for row in before]
    assert [row.tolist() for row in twin.positions] == before


@pytest.mark.parametrize(("scales", "size"), [("bfloat16", 2), ("fp8", 1)])
def test_int4_costs_a_scale_for_each_token_head_and_side(scales: Any, size: int) -> None:
    shape = Shape(3, 1000, 64, 64, 2)
    form = FireQ(scales=scales).store(torch.bfloat16, [shape], None)
    assert form.nbytes(shape, torch.full((1, 3), 1000)) == 3 * 1000 * 2 * (32 + size) + 3 * 2 * (64 + 1)


def test_the_budget_chooses_bits_and_the_published_ones_need_none() -> None:
    trace = trace_of(tokens=90)
    forms = [make_plan(trace, [FireQ(budget=budget)], torch.bfloat16).format for budget in (1.0, 0.7, 0.5)]
    assert isinstance(forms[0], DenseFormat)
    assert [form.bits for form in forms[1:] if isinstance(form, SmoothedFormat)] == [8, 4]
    assert make_plan(trace, [FireQ()], torch.bfloat16).format == SmoothedFormat(4, 128, 8, True)
    with pytest.raises(BudgetTooSmall) as refusal:
        make_plan(trace, [FireQ(budget=0.2)], torch.bfloat16)
    assert make_plan(trace, [FireQ(budget=refusal.value.smallest)], torch.bfloat16).precisions == ("4-bit",)
    with pytest.raises(BadBudget, match="keeps every token"):
        make_plan(trace, [FireQ(budget="20 tokens")], torch.bfloat16)


def test_more_bits_narrower_groups_and_exact_queries_are_closer() -> None:
    trace = trace_of(tokens=90)

    def error(**parameters: object) -> float:
        return float(make_plan(trace, [FireQ(**parameters)], torch.float32).error.mean())

    assert error(bits=8, fp8_query=False) < error(bits=8) < error(bits=4, group=4) < error(bits=4)
    assert error(bits=8, fp8_query=False) < 0.01


@pytest.mark.parametrize("architecture", ["llama", "mqa", "gemma3"])
def test_a_model_decodes_on_the_store(architecture: str) -> None:
    trace, model = trace_of(architecture, 90), tiny(architecture)
    plan = make_plan(trace, [FireQ()], torch.bfloat16)
    decoder = Decoder(model, plan.stores(), trace.tokens)
    assert sum(store.nbytes for store in decoder.stores) == plan.nbytes < plan.full_nbytes
    for step in range(4):
        assert bool(decoder.feed(torch.tensor([(7 * step + 3) % 256])).isfinite().all())


def test_it_stores_what_others_select() -> None:
    trace = trace_of(tokens=90)
    alone = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV()], torch.bfloat16)
    plan = make_plan(trace, [SnapKV(window=8, budget=0.5), AdaKV(), FireQ()], torch.bfloat16)
    assert torch.equal(plan.tiers == 1, alone.tiers == 1)
    assert sum(store.nbytes for store in plan.stores()) == plan.nbytes < 0.5 * alone.nbytes
