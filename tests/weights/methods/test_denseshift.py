"""Weights that are signed powers of two, against loops from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from tests.weights.support import drawn, layer_of
from workbench.errors import BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights import RTN, DenseShift, compressed
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SHIPPED, Calibration
from workbench.weights.layers import ShiftLinear, packed_nbytes
from workbench.weights.methods.quantise.denseshift import shifts


def levels(bits: int) -> list[float]:
    """All that a weight of so many bits can be, for a scale of one: the paper's zero-free set, its largest at one."""
    return [sign * 2.0**-k for sign in (1, -1) for k in range(2 ** (bits - 1))]


def error(values: Tensor, weight: Tensor, square: Tensor) -> Tensor:
    return (square * (values - weight).square()).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_is_a_sign_and_a_shift(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3, 5)[:, : 2**bits + 3]
    scale = torch.tensor([[1.0, 0.5, 2.0]] * 3)
    layer = ShiftLinear(codes, scale, bits, group=math.ceil(codes.shape[1] / 3))
    held = layer.dequantised()
    for o in range(3):
        for i in range(codes.shape[1]):
            group = i // math.ceil(codes.shape[1] / 3)
            assert float(held[o, i]) == levels(bits)[int(codes[o, i])] * float(scale[o, group])
    assert torch.equal(layer.rows(1, 2, torch.float32), held[1:2])
    x = drawn(4, codes.shape[1])
    torch.testing.assert_close(layer(x), x @ held.T)
    assert tensor_bytes(layer.buffers()) == packed_nbytes(3, codes.shape[1], bits, layer.group, zero_bytes=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4]), columns=st.integers(9, 40))
def test_every_weight_goes_to_the_nearest_level_and_none_to_zero(seed: int, bits: int, columns: int) -> None:
    weight, square = drawn(4, columns, seed=seed), drawn(columns, seed=seed + 1).exp()
    codes, scale = shifts(weight, square, bits, 16)
    held = ShiftLinear(codes, scale, bits, group=16).dequantised()
    assert bool((held != 0).all()) and torch.equal(held.sign(), weight.sign())
    for o in range(4):
        for i in range(columns):
            found = [level * float(scale[o, i // 16]) for level in levels(bits)]
            nearest = min(abs(float(weight[o, i]) - level) for level in found)
            assert abs(float(held[o, i] - weight[o, i])) <= nearest * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_scale_of_a_fine_search_is_much_better(bits: int) -> None:
    weight, square = drawn(12, 32, seed=bits), drawn(32, seed=9).exp()
    codes, scale = shifts(weight, square, bits, 32)
    got = error(ShiftLinear(codes, scale, bits, group=32).dequantised(), weight, square)
    table, best = torch.tensor(levels(bits)), torch.full((12,), torch.inf)
    for step in range(400):  # of the largest magnitude, from twice it to a 16th
        tried = weight.abs().amax(dim=1, keepdim=True) * 2 ** (1 - step / 80)
        found = (weight[..., None] - table * tried[..., None]).abs().argmin(dim=-1)
        best = torch.minimum(best, error(table[found] * tried, weight, square))
    assert bool((got <= 1.15 * best).all()) and float(got.sum()) <= 1.03 * float(best.sum())


def test_a_scale_is_the_best_for_its_levels() -> None:
    weight, square = drawn(6, 64, seed=3), drawn(64, seed=4).exp()
    codes, scale = shifts(weight, square, 3, 64)
    held = ShiftLinear(codes, scale, 3, group=64).dequantised()
    fitted = (square * held * weight).sum(1) / (square * held.square()).sum(1)  # the closed form, as a factor
    assert float((fitted - 1).abs().max()) < 0.05
    before, after = error(held, weight, square), error(held * fitted[:, None], weight, square)
    assert bool((before <= 1.02 * after).all())


def test_weights_that_are_powers_of_two_come_out_as_they_are() -> None:
    weight = 0.75 * torch.tensor(levels(4)).repeat(3, 4)[:, torch.randperm(64, generator=torch.Generator())]
    codes, scale = shifts(weight, torch.ones(64), 4, 64)
    torch.testing.assert_close(ShiftLinear(codes, scale, 4, group=64).dequantised(), weight, rtol=1e-6, atol=0)


def test_columns_whose_inputs_are_larger_err_less() -> None:
    weight, square = drawn(64, 32, seed=5), torch.ones(32)
    square[:4] = 1000

    def off(counts: Tensor) -> float:
        codes, scale = shifts(weight, counts, 3, 32)
        return float((ShiftLinear(codes, scale, 3, group=32).dequantised() - weight)[:, :4].square().sum())

    assert off(square) < 0.7 * off(torch.ones(32))


def test_groups_without_inputs_or_weights_are_harmless() -> None:
    weight, square = drawn(4, 40, seed=6), torch.ones(40)
    square[:16] = 0  # an expert that no token chose: then all columns count alike
    weight[2, 16:32] = 0  # a group of zeros: the smallest scale that float16 has
    codes, scale = shifts(weight, square, 4, 16)
    plain, _ = shifts(weight, torch.ones(40), 4, 16)
    held = ShiftLinear(codes, scale, 4, group=16).dequantised()
    assert torch.equal(codes[:, :16], plain[:, :16]) and bool(held.isfinite().all())
    assert float(held[2, 16:32].abs().max()) < 1e-4


def test_at_three_bits_and_fewer_it_changes_less_than_rounding_to_even_levels() -> None:
    weight = drawn(64, 64, seed=7)
    x = drawn(300, 64, seed=8)
    size = x.abs()
    inputs = InputStats(300, x.mean(0), size.mean(0), size.amax(0), x.square().mean(0), x.T @ x / 300)
    for bits in (2, 3):
        ours, theirs = (
            inputs.output_error(made.compress(layer_of(weight), inputs).dequantised() - weight).sum()
            for made in (DenseShift(bits=bits), RTN(bits=bits, symmetric=True))
        )
        assert float(ours) < float(theirs)


def test_it_is_as_small_as_its_bits_and_too_small_a_budget_names_that() -> None:
    model = tiny("llama")
    twin = compressed(model, [DenseShift(bits=3, group_size=32)])
    layer = twin.model.layers[0].mlp.down_proj
    assert isinstance(layer, ShiftLinear)
    assert layer.nbytes == packed_nbytes(layer.out_features, layer.in_features, 3, 32, zero_bytes=0)
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(model, [DenseShift(bits=3, group_size=32, budget=0.1)])
    compressed(model, [DenseShift(bits=3, group_size=32, budget=refusal.value.smallest)])


def test_a_trained_model_stays_the_nearer_the_more_bits() -> None:
    session = wb.Session("workbench-tiny")
    study = WeightStudy(session.model, session.tokenizer, Calibration(SHIPPED, samples=4, tokens=64))
    ids = session.read("The list type is a mutable sequence, typically used to store collections of items.").ids[None]

    def chances(bits: int | None) -> Tensor:
        methods = [] if bits is None else [DenseShift(bits=bits)]
        model = compressed(session.model, methods, study=lambda *_: study)
        with torch.no_grad():
            logits: Tensor = model(ids).logits[0].float()
        return logits.log_softmax(-1)

    full = chances(None)
    two, four = (float((full.exp() * (full - chances(bits))).sum(-1).mean()) for bits in (2, 4))
    assert four < 0.5 * two
