"""Rounded activations: after any method for the weights, against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.weights.support import drawn, layer_of, logits, studied, with_study
from workbench.errors import BadRecipe, NotApplicable
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights import GPTQ, RTN, SVD, AbsMax, Activations, QuaRot, Wanda, compressed
from workbench.weights.layers import IntegerLinear, SparsePackedLinear
from workbench.weights.layers.rounded_input import RoundedInput

UP_PROJ = "model.layers.0.mlp.up_proj"
_NORMAL = {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)}
E4M3 = sorted({m * 2.0**-9 for m in range(8)} | _NORMAL)[:-1]  # the last code is no number


def by_loops(x: Tensor, form: str, largest: float | None = None) -> Tensor:
    """Each token [n, i] on the form's levels between minus and plus its largest magnitude, or `largest`."""
    made = torch.empty_like(x)
    for row in range(x.shape[0]):
        most = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[form]
        step = (float(x[row].abs().max()) if largest is None else largest) / most
        for column, value in enumerate(x[row].tolist()):
            size = min(abs(value) / step, most)
            level = min(E4M3, key=lambda one: abs(one - size)) if form == "fp8" else float(round(size))
            made[row, column] = level * step if value > 0 else -level * step
    return made


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_each_token_is_rounded_in_steps_of_its_own(form: Any) -> None:
    x = drawn(5, 24) * drawn(5, 1, seed=2).exp() * 3
    layer = RoundedInput(layer_of(drawn(6, 24), drawn(6)), form)
    want = by_loops(x, form)
    torch.testing.assert_close(layer.rounded(x), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer(x), want @ layer.inner.weight.T + layer.inner.bias, rtol=1e-4, atol=1e-4)
    assert not layer(torch.zeros(2, 24)).sub(layer.inner.bias).any()


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_static_steps_cut_what_calibration_never_saw(form: Any) -> None:
    x = drawn(5, 24)
    most = {"int8": 127, "int4": 7, "fp8": 448}[form]
    layer = RoundedInput(layer_of(drawn(6, 24)), form, torch.tensor(1.5 / most))
    torch.testing.assert_close(layer.rounded(x), by_loops(x, form, 1.5), rtol=1e-4, atol=1e-6)
    assert float(layer.rounded(x).abs().max()) == pytest.approx(1.5)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integers_times_integers_are_what_the_plain_product_of_rounded_numbers_is(form: Any) -> None:
    model = tiny("llama")
    twin = compressed(model, [AbsMax(bits=8), Activations(form=form)])
    layer = twin.get_submodule(UP_PROJ)
    assert isinstance(layer, IntegerLinear) and layer.by_token
    x = drawn(5, layer.in_features)
    torch.testing.assert_close(layer(x), by_loops(x, form) @ layer.dequantised().T, rtol=1e-4, atol=1e-4)
    weights = compressed(model, [AbsMax(bits=8)]).get_submodule(UP_PROJ)
    assert layer.nbytes == weights.nbytes and torch.equal(layer.dequantised(), weights.dequantised())


def test_eight_bits_cost_less_than_four_and_a_little_more_than_none() -> None:
    model = tiny("llama")
    want = logits(model)

    def error(*methods: Any) -> float:
        return float((logits(compressed(model, methods)) - want).norm() / want.norm())

    alone = [error(Activations(form=form)) for form in ("int8", "fp8", "int4")]
    assert 0 < alone[0] < alone[1] < alone[2]


def test_static_steps_are_those_of_the_largest_input_that_calibration_saw() -> None:
    model = tiny("llama")
    study = studied(model)
    twin = with_study(model, Activations(static=True), study)
    seen: list[float] = []
    up_proj = model.get_submodule(UP_PROJ)
    handle = up_proj.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    logits(model, study.ids)
    handle.remove()
    assert float(twin.get_submodule(UP_PROJ).step) * 127 == pytest.approx(max(seen), rel=1e-4)
    assert not up_proj._forward_pre_hooks


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("others", [[RTN()], [Wanda(), GPTQ()], [SVD(), RTN()], [QuaRot(), GPTQ()], [QuaRot()]])
def test_it_comes_last_behind_whatever_the_weights_are_in(others: list[Any], static: bool) -> None:
    model = tiny("llama")
    before, twin = compressed(model, others), compressed(model, [Activations(static=static), *others])
    a, b = logits(before), logits(twin)
    assert 0 < float((a - b).norm() / a.norm()) < 0.2
    rounding = [m for m in twin.modules() if isinstance(m, IntegerLinear | RoundedInput)]
    steps = 4 * len(rounding) if static else 0
    assert tensor_bytes(twin.buffers()) == tensor_bytes(before.buffers()) + steps
    assert len(rounding) == 21 * (2 if others[0].key == "svd" else 1)


def test_what_stands_before_a_rounded_layer_keeps_its_form() -> None:
    twin = compressed(tiny("llama"), [Wanda(), RTN(), Activations()])
    layer = twin.get_submodule(UP_PROJ)
    assert isinstance(layer, RoundedInput) and isinstance(layer.inner, SparsePackedLinear)
    assert layer.describe()["inputs"] == "int8" and layer.describe()["density"] < 0.5


def test_inputs_are_rounded_once() -> None:
    with pytest.raises(BadRecipe, match="both round what enters the layers"):
        compressed(tiny("llama"), [Activations(), Activations(form="fp8")])
    with pytest.raises(NotApplicable, match="takes inputs as they are"):
        Activations().survey(compressed(tiny("llama"), [Activations()]))
