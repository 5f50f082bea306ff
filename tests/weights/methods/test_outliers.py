"""A few weights held exactly beside many held by few bits: EasyQuant and PB-LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.weights.support import drawn, seeded, stats_of
from workbench.errors import BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.compress import compressed
from workbench.weights.layers import OutliersLinear, PackedLinear, Parts, outliers_nbytes
from workbench.weights.methods.quantise.easyquant import EasyQuant, fitted, outliers
from workbench.weights.methods.quantise.pb_llm import PBLLM, binarised, largest
from workbench.weights.solvers.quantisation_grid import fit
from workbench.weights.survey import Survey

# --- The layer


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])  # columns, and a map
@pytest.mark.parametrize("whole", [False, True])
def test_outliers_are_held_in_their_places(share: float, whole: bool) -> None:
    weight = drawn(13, 44, seed=1)
    chosen = torch.rand(13, 44, generator=seeded(10)) < share
    chosen[4] = False  # a row without any
    scale = (weight.abs().amax(dim=1) / 127).half().float() if whole else None
    bias = nn.Parameter(drawn(13, seed=5))
    layer = OutliersLinear(weight, chosen, bias, scale=scale)
    held = layer.dequantised()
    for o in range(13):
        for i in range(44):
            want = float(weight[o, i]) if chosen[o, i] else 0.0
            step = float(scale[o]) if scale is not None and chosen[o, i] else 0.0
            assert abs(float(held[o, i]) - want) <= 0.5 * step + 1e-3 * abs(want)
    assert torch.equal(held[5:9], layer.rows(5, 9, torch.float32))
    for tokens in (1, 500):  # each by itself, and the whole weight
        x = drawn(tokens, 44, seed=6)
        torch.testing.assert_close(layer(x), x @ held.T + bias, rtol=1e-4, atol=1e-4)
    assert tensor_bytes(layer.buffers()) == outliers_nbytes(13, 44, int(chosen.sum()), 8 if whole else 16)
    assert (layer.map is None) == (2 * int(chosen.sum()) <= 13 * 6)


def test_outliers_of_a_bfloat16_layer_stay_bfloat16() -> None:
    weight = (drawn(4, 16, seed=11) * 1e6).bfloat16()  # beyond what float16 holds
    layer = OutliersLinear(weight, torch.ones(4, 16, dtype=torch.bool))
    assert torch.equal(layer.dequantised(torch.bfloat16), weight)


def test_one_bit_without_a_zero_is_plus_or_minus_half_a_scale() -> None:
    codes = torch.randint(0, 2, (3, 20), generator=seeded(9), dtype=torch.uint8)
    layer = PackedLinear(codes, torch.full((3, 2), 0.5), None, 1, group=16)
    assert torch.equal(layer.dequantised(), torch.where(codes == 1, 0.25, -0.25))


# --- EasyQuant


def test_what_lies_beyond_sigma_is_kept_up_to_a_share() -> None:
    weight = drawn(40, 50, seed=2)
    weight[3, 7], weight[20, 1] = 9.0, -8.0
    mean, deviation = float(weight.mean()), float(weight.std(correction=0))
    want = [[abs(float(w) - mean) > 3 * deviation for w in row] for row in weight]
    assert outliers(weight, 3.0, 2000).tolist() == want
    few = outliers(weight, 3.0, 2)
    assert few.nonzero().tolist() == [[3, 7], [20, 1]]
    assert not outliers(torch.ones(4, 4), 3.0, 4).any()


def test_outliers_come_back_exactly_and_the_rest_within_its_grid() -> None:
    linear = nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        linear.weight[7, 9] = 4.0
    method = EasyQuant(bits=3, group_size=32)
    layer, chosen = method.compress(linear), method.chosen(linear.weight.detach())
    assert isinstance(layer, Parts) and 0 < int(chosen.sum()) <= 0.01 * chosen.numel()
    off = (layer.dequantised() - linear.weight.detach()).abs()
    assert float(off[chosen].max()) < 2e-3 and chosen[7, 9]
    assert float(off[~chosen].max()) < 0.1  # 4.0 did not spoil its group's scale
    assert tensor_bytes(layer.buffers()) == method.nbytes(linear)
    plain = EasyQuant(bits=3, group_size=32, outliers=0)
    assert isinstance(plain.compress(linear), PackedLinear) and plain.nbytes(linear) < method.nbytes(linear)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (3, 24, True), (2, 32, False), (4, 100, True)])
def test_ranges_are_nowhere_worse_than_whole_and_nearly_as_good_as_any(bits: int, group: int, symmetric: bool) -> None:
    weight = drawn(16, 100, seed=3)
    begun = fit(weight, bits, group, symmetric=symmetric)
    ended = fitted(weight, begun, 50)

    def errors(scale: Tensor) -> Tensor:
        off = (begun._replace(scale=scale).nearest(weight) - weight).square()
        return torch.stack([off[:, at : at + group].sum(dim=1) for at in range(0, 100, group)], dim=1)

    assert bool((errors(ended.scale) <= errors(begun.scale) * (1 + 1e-5)).all())
    best = torch.stack([errors((begun.scale * (1 - 0.01 * n)).half().float()) for n in range(80)]).amin(dim=0)
    assert float(errors(ended.scale).sum()) < 1.35 * float(best.sum())
    assert float(errors(ended.scale).sum()) < 0.95 * float(errors(begun.scale).sum())
    assert torch.equal(fitted(weight, begun, 0).scale, begun.scale)


def test_without_data_it_loses_less_than_rounding_to_nearest() -> None:
    model = tiny("llama", layers=1)
    for linear in Survey.of(model, EasyQuant()).linears.values():
        weight = linear.weight.detach()
        ours = EasyQuant(bits=3, group_size=32).compress(linear).dequantised()
        plain = fit(weight, 3, 32, symmetric=True).nearest(weight)
        assert float((ours - weight).square().sum()) < 0.8 * float((plain - weight).square().sum())
    assert not EasyQuant.needs_inputs and not EasyQuant.needs_hessian


# --- PB-LLM


def test_signs_get_the_mean_magnitude_and_salient_weights_eight_bits() -> None:
    weight, group = drawn(5, 40, seed=7), 16
    chosen = largest(weight.abs(), 20)
    assert int(chosen.sum()) == 20 and float(weight[chosen].abs().min()) >= float(weight[~chosen].abs().max())
    made = binarised(weight, chosen, torch.eye(40), group)  # inputs that have nothing to do with each other
    held = (2 * made.codes.float() - 1) * made.alpha.repeat_interleave(group, dim=1)[:, :40] + made.beyond
    for o in range(5):
        step = max(abs(float(weight[o, i])) for i in range(40) if chosen[o, i]) / 127 if chosen[o].any() else 0
        for g in range(0, 40, group):
            rest = [abs(float(weight[o, i])) for i in range(g, min(g + group, 40)) if not chosen[o, i]]
            size = sum(rest) / len(rest)
            for i in range(g, min(g + group, 40)):
                w = float(weight[o, i])
                if chosen[o, i]:
                    assert abs(float(held[o, i]) - w) <= 0.51 * step + 1e-6
                else:
                    assert float(held[o, i]) == pytest.approx(size if w >= 0 else -size, rel=1e-3)


def test_no_other_size_of_the_signs_is_closer() -> None:
    weight = drawn(3, 32, seed=4)
    size = binarised(weight, torch.zeros(3, 32, dtype=torch.bool), torch.eye(32), 32).alpha

    def error(by: float) -> Tensor:
        return (weight - weight.sign() * size * by).square().sum(dim=1)

    assert all(bool((error(1.0) <= error(by) + 1e-4).all()) for by in (0.9, 0.97, 1.03, 1.1))


def test_of_equal_weights_exactly_as_many_as_asked_for_are_salient() -> None:  # trap W5
    assert int(largest(torch.ones(6, 10), 7).sum()) == 7
    assert int(largest(torch.ones(6, 10), 0).sum()) == 0


def _error(model: Any, study: WeightStudy, method: PBLLM) -> float:
    total = 0.0
    for _, inputs in study.inputs(hessians=True):
        for name, seen in inputs.items():
            linear = model.get_submodule(name)
            change = method.compress(linear, seen).dequantised() - linear.weight.detach()
            total += float(seen.output_error(change).sum())
    return total


def test_more_salient_weights_lose_less_and_the_hessian_picks_better_ones() -> None:
    model = tiny("llama", layers=2)
    study = WeightStudy(model, calibration=Calibration(SAMPLED, samples=8, tokens=64))
    errors = [_error(model, study, PBLLM(salient=share, group_size=32)) for share in (0.0, 0.05, 0.2)]
    assert errors[0] > errors[1] > errors[2]
    # Columns of unequal weight: what matters is not how large a weight is alone.
    x = drawn(400, 32, seed=8) * torch.logspace(-1.5, 0, 32)
    linear, seen = nn.Linear(32, 24, bias=False), stats_of(x)
    change = [
        PBLLM(salient=0.1, metric=metric, group_size=32).compress(linear, seen).dequantised() - linear.weight.detach()
        for metric in ("hessian", "magnitude")
    ]
    assert float(seen.output_error(change[0]).sum()) < float(seen.output_error(change[1]).sum())


def test_sizes_are_those_that_the_docstring_names() -> None:
    linear = nn.Linear(2048, 2048, bias=False)
    bits = [8 * PBLLM(salient=share).nbytes(linear) / linear.weight.numel() for share in (0.2, 0.02)]
    assert bits[0] == pytest.approx(1 + 1.6 + 1, abs=0.04)
    assert bits[1] == pytest.approx(1.5, abs=0.03)
    assert PBLLM().nbytes(linear) == PBLLM(group_size=2048).nbytes(linear) < PBLLM(group_size=128).nbytes(linear)


def test_no_smaller_budget_is_pretended() -> None:
    model = tiny("llama", layers=1)
    with pytest.raises(BudgetTooSmall) as caught:
        compressed(model, [PBLLM(salient=0.1, budget=0.1063)])  # 1.7 of 16 bits: signs and codes, places not counted
    compressed(model, [PBLLM(salient=0.1, budget=caught.value.smallest)])
