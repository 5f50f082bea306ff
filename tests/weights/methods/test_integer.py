"""Activations rounded beside weights: what integers are multiplied, and what is lost to zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.weights.support import seeded, stats_of
from workbench.measure import kernel_share
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.compress import compressed
from workbench.weights.layers import IntegerLinear, packed_nbytes
from workbench.weights.methods.quantise.crossquant import CrossQuant, profile
from workbench.weights.methods.quantise.odyssey import Odyssey, clipped
from workbench.weights.solvers.quantisation_grid import fit
from workbench_kernels.integer import cross_step, input_codes, input_step, integer_product

# --- Products of integers


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 8, 8), (5, 63, 7), (3, 1024, 4), (2, 2500, 3)])
def test_integer_products_are_exact(tokens: int, inputs: int, outputs: int) -> None:
    x = torch.randint(-127, 128, (tokens, inputs), generator=seeded(14)).to(torch.int8)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=seeded(15)).to(torch.int8)
    want = x.long() @ weight.long().T
    assert torch.equal(integer_product(x, weight).long(), want)


def test_the_largest_sums_of_a_slice_are_exact() -> None:
    x = torch.full((1, 1024), 127, dtype=torch.int8)
    weight = torch.full((2, 1024), -128, dtype=torch.int8)
    weight[1, 0] = -127
    assert integer_product(x, weight).tolist() == [[-127 * 128 * 1024, -127 * 128 * 1024 + 127]]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_multiplies_whole_numbers_of_both(bits: int) -> None:
    weight, x = torch.randn(6, 40, generator=seeded(5)), torch.randn(5, 40, generator=seeded(6))
    bias = nn.Parameter(torch.randn(6, generator=seeded(7)))
    grid = fit(weight, bits, 40, symmetric=True)
    layer = IntegerLinear(grid.codes(weight), grid.scale, None, bits, bias)
    assert layer.by_token
    want = torch.empty(5, 6)
    codes, middle = grid.codes(weight), 2 ** (bits - 1)
    for n in range(5):
        step = max(abs(float(v)) for v in x[n]) / 127
        whole = [round(float(v) / step) for v in x[n]]
        for o in range(6):
            total = sum(whole[i] * (int(codes[o, i]) - middle) for i in range(40))
            want[n, o] = total * step * float(layer.scale[o, 0]) + float(bias.detach()[o])
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert tensor_bytes(layer.buffers()) == packed_nbytes(6, 40, bits, 40, zero_bytes=0)


def test_groups_are_multiplied_as_what_their_numbers_stand_for() -> None:
    weight, x = torch.randn(6, 40, generator=seeded(8)), torch.randn(2, 3, 40, generator=seeded(9))
    grid = fit(weight, 4, 16, symmetric=True)
    layer = IntegerLinear(grid.codes(weight), grid.scale, None, 4, group=16, input_bits=4)
    assert not layer.by_token
    step = x.abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(layer(x), (x / step).round() * step @ layer.dequantised().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [CrossQuant(), Odyssey()])
def test_a_token_gets_the_same_numbers_alone_and_among_others(method: CrossQuant | Odyssey) -> None:
    x = torch.randn(20, 32, generator=seeded(1))
    layer = method.compress(nn.Linear(32, 8), stats_of(x))
    together = layer(x)
    for n in range(20):
        torch.testing.assert_close(layer(x[n : n + 1])[0], together[n], rtol=1e-5, atol=1e-6)


def test_a_token_of_zeros_stays_one() -> None:
    layer = Odyssey().compress(nn.Linear(16, 4, bias=False), stats_of(torch.randn(9, 16, generator=seeded(16))))
    assert torch.equal(layer(torch.zeros(1, 16)), torch.zeros(1, 4))


# --- CrossQuant


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_steps_lie_between_those_of_token_and_channel(alpha: float) -> None:
    x = torch.randn(2, 4, 12, generator=seeded(10))  # of two texts that are computed together
    step, rows = cross_step(x, 8, alpha).flatten(0, 1), x.flatten(0, 1).tolist()
    for n, row in enumerate(rows):
        for j in range(12):
            channel = max(abs(other[j]) for other in rows)
            want = max(map(abs, row)) ** alpha * channel ** (1 - alpha) / 127
            assert float(step[n, j]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_steps_by_calibration_are_the_smallest_of_their_profile_that_cut_nothing(alpha: float) -> None:
    x, seen = torch.randn(4, 12, generator=seeded(10)), torch.rand(12, generator=seeded(17)) + 0.5
    x[1] *= 100  # far beyond what was seen
    step = input_step(x, 8, profile(seen, alpha))
    for n in range(4):
        reach = max(abs(float(x[n, j])) / float(seen[j]) ** (1 - alpha) for j in range(12))
        for j in range(12):
            assert float(step[n, j]) == pytest.approx(reach * float(seen[j]) ** (1 - alpha) / 127, rel=1e-5)
    assert float((input_codes(x, step, 8) * step - x).abs().div(step).max()) <= 0.5 + 1e-4
    assert torch.allclose(step, input_step(x, 8).expand_as(step)) == (alpha == 1)


def test_the_kernel_is_what_rounds_to_zero_and_cross_steps_make_it_smaller() -> None:
    x = torch.randn(64, 32, generator=seeded(2))
    x[:, 3] *= 100  # an outlier channel
    x[0, 0] = 0.0
    by_token = input_step(x, 8)
    count = sum(
        float(x[n, j]) != 0 and round(float(x[n, j]) / float(by_token[n, 0])) == 0 for n in range(64) for j in range(32)
    )
    assert kernel_share(x, by_token) == pytest.approx(count / x.numel(), abs=1e-3)
    for crossed in (cross_step(x, 8, 0.15), input_step(x, 8, profile(x.abs().amax(0), 0.15))):
        assert kernel_share(x, crossed) < 0.1 * kernel_share(x, by_token)
    assert kernel_share(x, 1e-9) == 0


def test_an_outlier_channel_hurts_cross_steps_less_than_those_of_tokens() -> None:
    x = torch.randn(64, 32, generator=seeded(3))
    x[:, 3] *= 100
    linear = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        linear.weight[:, 3] *= 0.01  # as large inputs meet small weights
    want = x @ linear.weight.detach().T
    plain, calibrated, published = (
        float((method.compress(linear, stats_of(x))(x) - want).norm() / want.norm())
        for method in (CrossQuant(alpha=1.0), CrossQuant(), CrossQuant(channels="text"))
    )
    assert calibrated < 0.5 * plain and published < 0.5 * plain


def test_steps_of_the_text_are_those_of_what_is_computed_together() -> None:
    x, linear = torch.randn(6, 32, generator=seeded(3)), nn.Linear(32, 8)
    method = CrossQuant(channels="text")
    layer = method.compress(linear, stats_of(torch.zeros(1, 32)))  # calibration says nothing
    step = cross_step(x, 8, 0.15)
    torch.testing.assert_close(
        layer(x), (x / step).round() * step @ layer.dequantised().T + linear.bias, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(layer(x[:1])[0], layer(x)[0], rtol=1e-6, atol=1e-7)
    assert tensor_bytes(layer.buffers()) == method.nbytes(linear) == CrossQuant().nbytes(linear) - 2 * 32


def test_eight_bits_stay_close_and_four_bits_of_activations_do_not() -> None:
    model, ids = tiny("llama"), torch.arange(3, 67)[None]
    with torch.no_grad():
        want = model(ids).logits
        errors = [
            float((compressed(model, [CrossQuant(bits=w, input_bits=a)])(ids).logits - want).norm() / want.norm())
            for w, a in ((8, 8), (4, 8), (8, 4))
        ]
    assert errors[0] < 0.2
    assert errors[0] < errors[1] and errors[0] < errors[2]


@pytest.mark.parametrize("bits", [4, 8])
def test_channels_that_were_never_seen_have_some_step(bits: int) -> None:
    x = torch.randn(30, 16, generator=seeded(4))
    x[:, 7] = 0
    layer = CrossQuant(bits=bits).compress(nn.Linear(16, 4), stats_of(x))
    assert layer(torch.ones(2, 16)).isfinite().all()
    unseen = CrossQuant(bits=bits).compress(nn.Linear(16, 4), stats_of(torch.zeros(3, 16)))
    assert unseen(torch.ones(2, 16)).isfinite().all()


# --- OdysseyLLM


def test_ranges_are_cut_where_the_error_is_smallest() -> None:
    weight, square = torch.randn(5, 48, generator=seeded(12)), torch.rand(48, generator=seeded(13))
    found = clipped(weight, square, 20)
    error = ((found.nearest(weight) - weight).square() * square).sum(dim=1)
    for number in range(20):
        other = fit(weight, 4, 48, symmetric=True, shrink=1 - 0.5 * number / 20)
        assert bool((error <= ((other.nearest(weight) - weight).square() * square).sum(dim=1) + 1e-9).all())
    assert bool((found.scale < fit(weight, 4, 48, symmetric=True).scale).any())


def test_the_recipe_loses_less_than_rounding_rows() -> None:
    model = tiny("llama", layers=2)
    study = WeightStudy(model, calibration=Calibration(SAMPLED, samples=8, tokens=64))
    ours = plain = 0.0
    for _, inputs in study.inputs(hessians=True):
        for name, seen in inputs.items():
            weight = model.get_submodule(name).weight.detach()
            made = Odyssey().compress(model.get_submodule(name), seen).dequantised()
            row = fit(weight, 4, weight.shape[1], symmetric=True).nearest(weight)
            ours += float(seen.output_error(made - weight).sum())
            plain += float(seen.output_error(row - weight).sum())
    assert ours < 0.8 * plain
