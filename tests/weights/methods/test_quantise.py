"""Rounding with calibration: GPTQ, AWQ, OWQ, SliM-LLM and the plain absolute maximum, against loops from the papers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.weights.support import correlated, drawn, layer_of, logits, stats_of, studied, with_study
from workbench.errors import BadParameter, CalibrationFailed
from workbench.models import tiny
from workbench.models.decoder import decoder_layers
from workbench.weights import AWQ, GPTQ, OWQ, RTN, AbsMax, SliMLLM, compressed
from workbench.weights.bases.quantiser import Quantiser
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.layers import CompactLinear, PackedLinear, Parts
from workbench.weights.methods.quantise.owq import weak_columns
from workbench.weights.solvers import gptq as gptq_module
from workbench.weights.solvers.activation_scales import awq_columns, group_errors
from workbench.weights.solvers.bit_exchange import bits_by_divergence, bits_exchanged, drawn_inputs
from workbench.weights.solvers.gptq import gptq
from workbench.weights.solvers.group_grids import binary, near_grid, salient_grid
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.quantisation_grid import Grid, fit, fit_least, fit_range, squares
from workbench.weights.solvers.range_search import searched
from workbench.weights.surgery.folding import fold, folds
from workbench.weights.surgery.sharing_copy import sharing_copy

METHODS = (AbsMax, GPTQ, AWQ, OWQ, SliMLLM)
ORACLE = Path(__file__).parents[1] / "data" / "weight_oracle.safetensors"


def loss(method: Quantiser, weight: Tensor, inputs: InputStats) -> float:
    """What the method changes in the outputs, as a share of their mean square."""
    made = method.compress(layer_of(weight), inputs)
    assert isinstance(made, CompactLinear)
    return float(inputs.output_error(made.dequantised() - weight).sum() / inputs.output_error(weight).sum())


# -- GPTQ


def one_by_one(
    weight: Tensor, hessian: Tensor, bits: int, group: int, order: list[int] | None = None, exact: int = 0
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery as equations 2 and 3 of the paper have it, column by column, the inverse made anew each
    time: the rounded columns and the exact ones, float64. order: then the grids are those of the original weight.
    """
    left, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1] - exact
    grids: dict[int, Grid] = {}
    for number in range(-(-columns // group)) if order else ():
        grids[number] = fit(weight[:, number * group : min((number + 1) * group, columns)], bits, group)
    rest = list(range(weight.shape[1]))
    made = torch.empty_like(left[:, :columns])
    for column in order or range(columns):
        number = column // group
        if number not in grids:
            grids[number] = fit(left[:, number * group : min((number + 1) * group, columns)].float(), bits, group)
        grid = grids[number]
        scale, zero = grid.scale[:, 0].double(), grid.zero[:, 0].double()
        code = (left[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        made[:, column] = (code - zero) * scale
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        own = rest.index(column)
        lost = (left[:, column] - made[:, column]) / inverse[own, own]
        left[:, rest] -= lost[:, None] * inverse[own]
        rest.remove(column)
    return made, left[:, columns:]


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    return moment.double() + share * moment.diagonal().mean().double() * torch.eye(len(moment))


def by_gptq(weight: Tensor, moment: Tensor, bits: int, group: int, **options: object) -> tuple[Tensor, Tensor]:
    done = gptq(weight, moment, lambda part, _: fit(part, bits, part.shape[1]), group, **options)  # type: ignore[arg-type]
    return Grid(done.scale, done.zero, bits, group).dequantised(done.codes), done.exact


@pytest.mark.parametrize("block", [4, 8, 128])
@pytest.mark.parametrize("group", [3, 8, 20, 40])
def test_gptq_is_brain_surgery_column_by_column(monkeypatch: pytest.MonkeyPatch, block: int, group: int) -> None:
    # Trap 4: groups shorter and longer than the block that is updated at once give what the plain loop gives.
    monkeypatch.setattr(gptq_module, "_BLOCK", block)
    weight, moment = drawn(6, 40), stats_of(correlated(400, 40)).hessian
    want, _ = one_by_one(weight, damped(moment), 3, group)
    got, _ = by_gptq(weight, moment, 3, group)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [4, 128])
def test_gptq_in_the_order_of_activations_keeps_grids_of_neighbours(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(gptq_module, "_BLOCK", block)
    weight, moment = drawn(6, 30), stats_of(correlated(400, 30)).hessian
    order = moment.diagonal().argsort(descending=True).tolist()
    want, _ = one_by_one(weight, damped(moment), 3, 8, order)
    got, _ = by_gptq(weight, moment, 3, 8, order="activations")
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [4, 128])
def test_gptq_in_the_order_of_groups_settles_each_group_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Groups by their largest input, their columns by theirs; a group's grid is that of its columns by then."""
    monkeypatch.setattr(gptq_module, "_BLOCK", block)
    weight, moment = drawn(6, 30), stats_of(correlated(400, 30)).hessian
    sizes = moment.diagonal().tolist()
    groups = sorted(range(4), key=lambda number: -max(sizes[8 * number : 8 * number + 8]))
    order = [c for n in groups for c in sorted(range(8 * n, min(8 * n + 8, 30)), key=lambda column: -sizes[column])]
    left, grids, made = weight.double().clone(), {}, torch.empty(6, 30, dtype=torch.float64)
    rest = list(range(30))
    for column in order:
        number = column // 8
        if number not in grids:
            grids[number] = fit(left[:, 8 * number : min(8 * number + 8, 30)].float(), 3, 8)
        scale, zero = (part[:, 0].double() for part in grids[number][:2])
        made[:, column] = ((left[:, column] / scale + zero).round().clamp(0, 7) - zero) * scale
        inverse = torch.linalg.inv(damped(moment)[rest][:, rest])
        own = rest.index(column)
        left[:, rest] -= ((left[:, column] - made[:, column]) / inverse[own, own])[:, None] * inverse[own]
        rest.remove(column)
    got, _ = by_gptq(weight, moment, 3, 8, order="groups")
    torch.testing.assert_close(got.double(), made, rtol=1e-3, atol=1e-3)


def test_two_orders_at_once_are_refused() -> None:
    with pytest.raises(BadParameter, match="two orders"):
        GPTQ(act_order=True, group_aware=True)


def test_gptq_can_be_told_which_weights_are_there() -> None:
    """A weight that is left out is an error like any other, and what comes after makes up for it."""
    weight, moment, kept = drawn(6, 30), stats_of(correlated(400, 30)).hessian, drawn(6, 30, seed=8) > 0
    left, rest, made = weight.double().clone(), list(range(30)), torch.empty(6, 30, dtype=torch.float64)
    grids: dict[int, Grid] = {}
    for column in range(30):
        number = column // 8
        if number not in grids:
            grids[number] = fit(left[:, 8 * number : min(8 * number + 8, 30)].float(), 3, 8)
        scale, zero = (part[:, 0].double() for part in grids[number][:2])
        rounded = ((left[:, column] / scale + zero).round().clamp(0, 7) - zero) * scale
        made[:, column] = torch.where(kept[:, column], rounded, 0.0)
        inverse = torch.linalg.inv(damped(moment)[rest][:, rest])
        lost = (left[:, column] - made[:, column]) / inverse[0, 0]
        left[:, rest] -= lost[:, None] * inverse[0]
        rest.remove(column)
    got, _ = by_gptq(weight, moment, 3, 8, kept=kept)
    torch.testing.assert_close(got.double(), made, rtol=1e-3, atol=1e-3)
    assert not got[~kept].any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_range_search_tries_eighty_shares_and_takes_the_best(bits: int, symmetric: bool) -> None:
    weight = drawn(3, 20)
    found = fit_range(weight, bits, 8, symmetric=symmetric, every_level=True)
    got = found.nearest(weight)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    for row in range(3):
        for first in (0, 8, 16):
            own = weight[row, first : first + 8].double()
            low, high = min(float(own.min()), 0.0), max(float(own.max()), 0.0)
            if symmetric:
                high = max(high, -low)
                low = -high
            best = math.inf
            for step in range(80):
                share = 1 - step / 100
                scale = float(torch.tensor(share * (high - low) / top).half())
                zero = middle if symmetric else min(max(round(-share * low / scale), 0), top)
                cost = sum(
                    abs((min(max(round(x / scale) + zero, 0), top) - zero) * scale - x) ** 2.4 for x in own.tolist()
                )
                best = min(best, cost)
            ours = float((got[row, first : first + 8].double() - own).abs().pow(2.4).sum())
            assert abs(ours - best) <= 1e-3 * best + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grids_use_every_level(bits: int) -> None:
    """As compressed-tensors computes it: the range from minus to plus the largest magnitude in 2 ** bits - 1 steps."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = drawn(6, 48)
    grid = RTN(bits=bits, group_size=16, symmetric=True).grid(weight)
    rows = weight.view(6, 3, 16)
    args = quantization.QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=16)
    scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
    torch.testing.assert_close(grid.scale, scale, rtol=1e-3, atol=1e-6)
    codes = RTN(bits=bits, group_size=16, symmetric=True).compress(layer_of(4 * drawn(64, 48))).codes()
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_sequential_method_is_shown_what_the_compressed_blocks_make_of_the_texts(block: int) -> None:
    model = tiny("llama")
    study = studied(model)
    twin = with_study(model, GPTQ(bits=2), study)
    name, seen = f"model.layers.{block}.self_attn.q_proj", list[Tensor]()
    handle = twin.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(twin, study.ids)
    handle.remove()
    want = torch.cat(seen).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(observed(twin, study, name).square, want, rtol=1e-3, atol=1e-5)


def observed(twin: PreTrainedModel, study: WeightStudy, name: str) -> InputStats:
    """What a study would show of a layer in a copy whose layers before it are compressed."""
    plain = sharing_copy(twin)
    plain.set_submodule(name, study.model.get_submodule(name))
    block = name.rsplit(".", 2)[0]
    return dict(study.inputs(hessians=False, behind=plain))[block][name]


def test_sequential_statistics_let_later_blocks_make_up_for_earlier_ones() -> None:
    """Blocks that saw what the rounded ones before them make of the texts end nearer to what the model makes."""
    model = tiny("llama")
    study = studied(model, samples=16)
    twins = [with_study(model, GPTQ(bits=2, sequential=sequential), study) for sequential in (True, False)]
    runner = study.block_runner()
    wanted = {}
    for name, _ in runner:
        for _ in runner.run(name):
            pass
        wanted[name] = runner.hidden
    names, lost = list(wanted), []
    entering = study.block_runner()
    for twin in twins:
        hidden = entering.hidden
        for name in names:
            hidden = entering.forward(name, hidden, twin.get_submodule(name))
        lost.append(float((hidden - wanted[names[-1]]).square().sum()))
    assert lost[0] < lost[1]


@pytest.mark.parametrize("order", ["columns", "activations", "groups"])
def test_columns_that_stay_exact_take_up_all_that_they_can(order: str) -> None:
    weight, moment = drawn(5, 24), stats_of(correlated(400, 24)).hessian
    rounded, exact = by_gptq(weight, moment, 2, 8, order=order, exact=4)
    change = torch.cat([rounded, exact], dim=1) - weight
    slope = change.double() @ damped(moment)  # of tr(Δ H Δᵀ); where it is zero, no other values are better
    assert slope[:, 20:].abs().max() < 1e-4 * slope[:, :20].abs().max()


@pytest.mark.parametrize("moment", [torch.eye(24), torch.diag(drawn(24).exp()), torch.zeros(24, 24)])
def test_inputs_that_tell_nothing_about_each_other_make_gptq_round_to_nearest(moment: Tensor) -> None:
    weight = drawn(5, 24)
    got, _ = by_gptq(weight, moment, 4, 8)
    assert torch.equal(got, fit(weight, 4, 8).nearest(weight))


def test_channels_that_were_never_seen_are_rounded_to_nearest_not_zeroed() -> None:  # trap W4
    x = correlated(400, 24)
    x[:, [3, 17]] = 0
    weight, moment = drawn(5, 24), stats_of(x).hessian
    got, _ = by_gptq(weight, moment, 4, 24, order="activations")
    want = fit(weight, 4, 24).nearest(weight)
    assert torch.equal(got[:, [3, 17]], want[:, [3, 17]]) and bool(got[:, [3, 17]].abs().min() > 0)
    assert not torch.equal(got, want)


def test_the_factor_is_that_of_the_inverse() -> None:
    moment = stats_of(correlated(400, 20)).hessian
    factor = inverse_factor(moment, 0.01).double()
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(factor.T @ factor @ damped(moment), torch.eye(20).double(), rtol=0, atol=1e-4)


def test_a_moment_without_a_factor_is_damped_more_and_more() -> None:  # trap W4
    moment = torch.diag(torch.tensor([1.0] * 19 + [-0.03]))
    factor = inverse_factor(moment, 0.001).double()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped(moment, 0.1)), rtol=1e-4, atol=1e-6)


def test_a_moment_that_nothing_helps_is_an_error_with_the_layer_and_never_plain_rounding() -> None:  # trap W4
    with pytest.raises(CalibrationFailed, match="2 inputs has no Cholesky factor"):
        inverse_factor(torch.tensor([[1.0, -9.0], [-9.0, 1.0]]), 0.01)
    with pytest.raises(CalibrationFailed):
        inverse_factor(torch.full((3, 3), torch.nan), 0.01)
    model = tiny("llama")

    class Broken:
        def inputs(self, **options: object) -> list[tuple[str, dict[str, InputStats]]]:
            flat = torch.zeros(64)
            moment = torch.eye(64) - 0.5 * torch.ones(64, 64)
            return [("block", {"model.layers.1.mlp.up_proj": InputStats(1, flat, flat, flat, flat, moment)})]

    with pytest.raises(CalibrationFailed, match=r"gptq, model\.layers\.1\.mlp\.up_proj: "):
        compressed(model, [GPTQ()], study=lambda *_: Broken())  # type: ignore[arg-type, return-value]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 3, 4]), columns=st.sampled_from([24, 36, 64]))
def test_awq_never_changes_outputs_more_than_rounding_to_nearest(seed: int, bits: int, columns: int) -> None:
    weight, inputs = drawn(16, columns, seed=seed), stats_of(correlated(400, columns, seed=seed))
    nearest = loss(RTN(bits=bits, group_size=16), weight, inputs)
    assert loss(AWQ(bits=bits, group_size=16), weight, inputs) <= nearest * 1.0001


@pytest.mark.parametrize("columns", [36, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_changes_outputs_less_than_rounding_to_nearest(bits: int, columns: int) -> None:
    gains = []
    for seed in range(6):  # it goes column by column, so a single small layer may come out no better
        weight, inputs = drawn(16, columns, seed=seed), stats_of(correlated(400, columns, seed=seed))
        nearest = loss(RTN(bits=bits, group_size=16), weight, inputs)
        gains.append(
            [loss(GPTQ(bits=bits, group_size=16, act_order=order), weight, inputs) / nearest for order in (False, True)]
        )
    plain, ordered = (sum(gain[order] for gain in gains) / len(gains) for order in (0, 1))
    assert ordered < 0.8 and plain < 1


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "mixtral", "gemma3"])
@pytest.mark.parametrize(
    "method", [GPTQ(group_size=40), AWQ(bits=3, group_size=40), OWQ(bits=3), SliMLLM(group_size=24)]
)
def test_biases_fused_layers_and_odd_groups_are_taken_as_they_are(
    tiny_model: Callable[[str], PreTrainedModel], architecture: str, method: Quantiser
) -> None:
    model = tiny_model(architecture)
    twin = compressed(model, [method])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want, got = model(ids).logits, twin(ids).logits
    assert 0 < float((got - want).norm() / want.norm()) < 1
    plain = dict(model.named_modules())
    for name, module in twin.named_modules():
        if isinstance(module, CompactLinear) and name in plain:
            assert module.bias is plain[name].bias


# -- AWQ


def by_exponents(weight: Tensor, x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Of all 20 exponents the scaled, rounded weight that changes the outputs of x [n, i] least, and its columns."""
    found = []
    for step in range(20):
        scales = torch.tensor([float(abs(x[:, i]).mean()) ** (step / 20) for i in range(weight.shape[1])])
        scales = scales / (scales.max() * scales.min()).sqrt()
        columns = (1 / scales).half().float()
        scaled = weight / columns
        made = fit(scaled, bits, group).nearest(scaled) * columns
        found.append((float((x @ (made - weight).T).square().sum()), step, made, columns))
    _, _, made, columns = min(found, key=lambda one: one[:2])
    return made, columns


def test_awq_takes_the_exponent_that_changes_outputs_least() -> None:
    for seed in range(4):
        weight, x = drawn(12, 32, seed=seed), correlated(400, 32, seed=seed + 20)
        made, columns = by_exponents(weight, x, 3, 16)
        layer = AWQ(bits=3, group_size=16, clip=False).compress(layer_of(weight), stats_of(x))
        torch.testing.assert_close(layer.columns.float(), columns, rtol=1e-3, atol=0)
        torch.testing.assert_close(layer.dequantised(), made, rtol=1e-3, atol=1e-3)


def test_awq_leaves_inputs_of_one_size_unscaled() -> None:
    x = drawn(400, 16)
    stats = stats_of(x / x.abs().mean(0))
    assert torch.equal(
        awq_columns(drawn(4, 16), stats, lambda scaled: fit(scaled, 3, 8).nearest(scaled)), torch.ones(16)
    )


def test_clipping_makes_no_output_worse() -> None:
    weight, inputs = drawn(24, 40), stats_of(correlated(400, 40))
    errors = [
        inputs.output_error(
            AWQ(bits=3, group_size=16, clip=clip).compress(layer_of(weight), inputs).dequantised() - weight
        )
        for clip in (True, False)
    ]
    assert bool((errors[0] <= errors[1] * 1.0001).all()) and bool((errors[0] < 0.99 * errors[1]).any())


@pytest.mark.parametrize("architecture", ["llama", "mha", "qwen2", "qwen3", "mistral", "phi3"])
def test_scales_are_folded_into_what_comes_before(architecture: str) -> None:
    """Whatever the scales, the model computes the same."""
    model = tiny(architecture)
    want, twin = logits(model), sharing_copy(model)
    for block in decoder_layers(twin).values():
        for number, place in enumerate(folds(block)):
            width = block.get_submodule(place.layers[0]).in_features
            fold(block, place, drawn(width, seed=number).exp())
    torch.testing.assert_close(logits(twin), want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(twin.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)
    found = [place.before for place in folds(next(iter(decoder_layers(model).values())))]
    assert ("self_attn.v_proj" in found) is (architecture == "mha") and len(found) == 3 + (architecture == "mha")


def test_awq_takes_the_scales_by_which_attention_says_most_nearly_the_same() -> None:
    model = tiny("mha")
    study = studied(model)
    twin = with_study(model, AWQ(bits=3, group_size=16, clip=False, texts=4), study)
    block, inputs = next(iter(study.inputs(hessians=True)))
    runner, seen = study.block_runner(), list[Any]()
    attention: Any = model.get_submodule(f"{block}.self_attn")
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    runner.forward(block, runner.hidden)
    handle.remove()
    plain = {name: getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")}
    size, errors = inputs[f"{block}.self_attn.q_proj"].absmean.clamp_min(1e-4), []
    with torch.no_grad():
        want = torch.cat([attention(*args, **kwargs)[0] for args, kwargs in seen])
        for step in range(20):
            scales = size ** (step / 20)
            scales = scales / (scales.max() * scales.min()).sqrt()
            for name, weight in plain.items():
                near = fit(weight * scales, 3, 16).nearest(weight * scales) / scales
                getattr(attention, name).weight = torch.nn.Parameter(near)
            got = torch.cat([attention(*args, **kwargs)[0] for args, kwargs in seen])
            errors.append((float((got - want).square().mean()), step, scales))
    norms = [x.get_submodule(f"{block}.input_layernorm").weight for x in (model, twin)]
    torch.testing.assert_close(norms[0] / norms[1], min(errors, key=lambda one: one[:2])[2], rtol=1e-4, atol=1e-5)
    layer = twin.get_submodule(f"{block}.self_attn.q_proj")
    assert isinstance(layer, PackedLinear) and layer.columns is None


def test_awq_clips_no_queries_and_keys() -> None:
    model = tiny("mha")
    study = studied(model)
    clipped, whole = (with_study(model, AWQ(bits=2, group_size=16, clip=clip), study) for clip in (True, False))
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        one, other = (twin.get_submodule(f"model.layers.0.{name}") for twin in (clipped, whole))
        assert torch.equal(one.dequantised(), other.dequantised())
    one, other = (twin.get_submodule("model.layers.0.mlp.up_proj") for twin in (clipped, whole))
    assert not torch.equal(one.dequantised(), other.dequantised())


def test_layers_that_no_fold_is_known_for_hold_their_scales_themselves() -> None:
    layer = compressed(tiny("gemma3"), [AWQ(group_size=40)]).get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, PackedLinear) and layer.columns is not None


def test_errors_of_groups_are_those_of_their_columns_alone() -> None:
    change, x = drawn(3, 21), correlated(400, 21)
    got = group_errors(change, stats_of(x).hessian, 8)
    for row in range(3):
        for number in range(3):
            own = slice(8 * number, 8 * (number + 1))
            want = (x[:, own] @ change[row, own]).square().mean()
            torch.testing.assert_close(got[row, number], want, rtol=1e-4, atol=1e-5)


# -- OWQ


def test_weak_columns_are_those_that_rounding_hurts_most() -> None:
    change, x = drawn(6, 15), correlated(400, 15)
    hurt = [float(x[:, i].square().mean() * sum(change[row, i] ** 2 for row in range(6))) for i in range(15)]
    want = sorted(sorted(range(15), key=lambda i: -hurt[i])[:4])
    assert weak_columns(change, x.square().mean(0), 4).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weak_columns_are_held_at_16_bits_and_the_rest_is_packed(dtype: torch.dtype) -> None:
    x = correlated(400, 64)
    x[:, [5, 40]] *= 30
    weight = drawn(16, 64).to(dtype)
    method = OWQ(bits=3, group_size=16, weak=2 / 64)
    layer = method.compress(layer_of(weight, drawn(16)), stats_of(x))
    assert isinstance(layer, Parts)
    packed, kept = layer.parts
    assert isinstance(packed, PackedLinear) and packed.in_features == 62
    assert layer.chosen(1).tolist() == [5, 40]
    assert kept.weight.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    assert layer.nbytes == method.nbytes(layer_of(weight))
    inputs = drawn(3, 64, seed=9)
    torch.testing.assert_close(layer(inputs), inputs @ layer.dequantised().T + layer.bias, rtol=1e-4, atol=1e-4)


def test_outliers_of_the_inputs_make_weak_columns_worth_their_bytes() -> None:
    x = correlated(400, 64)
    x[:, [5, 40]] *= 30
    weight, inputs = drawn(32, 64), stats_of(x)
    assert loss(OWQ(bits=3, group_size=16, weak=2 / 64), weight, inputs) < 0.5 * loss(
        GPTQ(bits=3, group_size=16), weight, inputs
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_other_step_and_zero_changes_a_group_less(symmetric: bool) -> None:
    weight, bits, ranges = drawn(3, 20) + 0.3, 2, 7
    found = searched(weight, bits, 8, ranges, symmetric=symmetric)
    got = found.nearest(weight)
    for row, first in itertools.product(range(3), (0, 8, 16)):
        own = weight[row, first : first + 8].tolist()
        low, high = min(0.0, *own), max(0.0, *own)
        widest = max(-low, high) / 2 if symmetric else (high - low) / 3
        costs = []
        for step, zero in itertools.product(range(1, ranges + 1), (2,) if symmetric else range(4)):
            scale = float(torch.tensor(widest * step / ranges).half())
            costs.append(sum(abs(min(max(round(w / scale), -zero), 3 - zero) * scale - w) ** 2.4 for w in own))
        mine = sum(abs(g - w) ** 2.4 for g, w in zip(got[row, first : first + 8].tolist(), own, strict=True))
        assert mine == pytest.approx(min(costs), rel=1e-3)


def test_without_weak_columns_owq_is_gptq_on_truncated_grids() -> None:
    weight, inputs = drawn(8, 32), stats_of(correlated(400, 32))
    layer = OWQ(bits=3, group_size=16, weak=0.0).compress(layer_of(weight), inputs)
    assert isinstance(layer, PackedLinear)
    assert layer.nbytes == GPTQ(bits=3, group_size=16).compress(layer_of(weight), inputs).nbytes


# -- SliM-LLM


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 9))
def test_as_many_groups_gain_a_bit_as_lose_one_at_the_least_loss(seed: int, groups: int) -> None:
    matters, losses = drawn(groups, seed=seed).exp(), drawn(3, groups, seed=seed + 1).exp()
    found = bits_exchanged(losses, matters)
    assert int((found == 1).sum()) == int((found == -1).sum())
    order = sorted(range(groups), key=lambda number: float(matters[number]))
    totals = []
    for pairs in range(groups // 2 + 1):
        chosen = [0] * groups
        for number in order[:pairs]:
            chosen[number] = -1
        for number in order[groups - pairs :]:
            chosen[number] = 1
        totals.append((float(sum(losses[bits + 1, number] for number, bits in enumerate(chosen))), chosen))
    assert found.tolist() == min(totals, key=lambda one: one[0])[1]


def test_one_bit_is_the_mean_and_the_best_distance_from_it() -> None:
    weight = drawn(3, 16)
    got = binary(weight, 8).nearest(weight)
    for row in range(3):
        for first in (0, 8):
            group = weight[row, first : first + 8]
            mean = float(group.mean())
            want = min(
                (sum((float(w) - mean - (distance if w > mean else -distance)) ** 2 for w in group), distance)
                for distance in [step / 1000 for step in range(2000)]
            )[1]
            levels = sorted(set(got[row, first : first + 8].tolist()))
            assert len(levels) == 2
            assert abs(levels[0] - mean + want) < 3e-3 and abs(levels[1] - mean - want) < 3e-3


def test_the_grid_of_a_group_suits_the_columns_that_cannot_be_made_up_for() -> None:
    weight, moment = drawn(32, 16), stats_of(correlated(400, 16)).hessian
    factor = inverse_factor(moment, 0.01)
    cost = torch.linalg.inv(damped(moment)).diagonal().float()

    def hurt(grid: Grid) -> Tensor:
        return ((grid.nearest(weight) - weight).square() / cost).sum(dim=1)

    found, plain = salient_grid(weight, factor, 2), fit(weight, 2, 16)
    least = fit_least(weight, 2, 16, [1.0, 0.8, 0.6], lambda change: squares(change, 16))
    assert bool((hurt(found) <= hurt(plain)).all())
    assert float(hurt(found).sum()) < float(hurt(least).sum())


def test_as_many_pairs_exchange_a_bit_as_leave_the_distributions_of_outputs_closest() -> None:
    for seed in range(4):
        weight, x = drawn(6, 24, seed=seed), drawn(50, 24, seed=9) * torch.linspace(-1, 1.5, 24).exp()
        rounded = torch.stack([fit(weight, bits, 4).nearest(weight) for bits in (1, 2, 3)])
        salience = (weight * x.square().mean(0).sqrt()).square().unflatten(1, (6, 4)).sum(dim=(0, 2))
        order, found = salience.argsort().tolist(), []
        for pairs in range(4):
            levels = [1] * 6
            for low, high in zip(order[:pairs], order[::-1][:pairs], strict=True):
                levels[low], levels[high] = 0, 2
            mixed = torch.cat([rounded[level][:, 4 * g : 4 * g + 4] for g, level in enumerate(levels)], dim=1)
            p, q = (x @ mixed.T).softmax(-1), (x @ weight.T).softmax(-1)
            found.append((float((p * (p / q).log()).sum(-1).mean()), [level - 1 for level in levels]))
        assert bits_by_divergence(weight, rounded, x, salience).tolist() == min(found)[1]


def test_drawn_inputs_have_the_moments_of_what_was_seen() -> None:
    seen = stats_of(correlated(400, 6)).hessian
    x = drawn_inputs(seen)
    assert x.shape == (256, 6) and torch.equal(x, drawn_inputs(seen))
    spread = seen.diagonal().sqrt()
    assert float(((x.T @ x / 256 - seen) / spread / spread[:, None]).abs().max()) < 0.3


def test_published_ranges_are_the_best_within_a_tenth_of_a_groups_own() -> None:
    weight = drawn(5, 16)
    found = near_grid(weight, 2).nearest(weight)
    for row in range(5):
        costs = [
            float(
                (fit(weight[[row]], 2, 16, shrink=1 + step / 500).nearest(weight[[row]]) - weight[row])
                .abs()
                .pow(2.4)
                .sum()
            )
            for step in range(-50, 51)
        ]
        assert float((found[row] - weight[row]).abs().pow(2.4).sum()) == pytest.approx(min(costs), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_slim_llm_changes_outputs_less_than_gptq_at_the_same_bits(bits: int) -> None:
    for seed in range(3):
        x = correlated(400, 136, seed=seed) * torch.linspace(-2, 2, 136).exp()  # groups that matter, and others
        weight, inputs = drawn(24, 136, seed=seed), stats_of(x)
        method = SliMLLM(bits=bits, group_size=16)
        assert loss(method, weight, inputs) < loss(GPTQ(bits=bits, group_size=16), weight, inputs)
        layer = method.compress(layer_of(weight), inputs)
        assert isinstance(layer, Parts)
        counts = {part.bits: part.in_features for part in layer.parts}
        assert set(counts) <= {bits - 1, bits, bits + 1} and counts[bits - 1] == counts[bits + 1]
        spent = sum(part.bits * part.in_features for part in layer.parts)
        assert spent == bits * 136
        assert layer.nbytes <= method.nbytes(layer_of(weight))


def test_a_shorter_last_group_keeps_the_usual_bits() -> None:
    x = correlated(400, 72) * torch.linspace(2, -2, 72).exp()
    layer = SliMLLM(bits=3, group_size=16).compress(layer_of(drawn(8, 72)), stats_of(x))
    assert isinstance(layer, Parts)
    usual = next(index for index, part in enumerate(layer.parts) if part.bits == 3)
    assert set(range(64, 72)) <= set(layer.chosen(usual).tolist())


# -- the absolute maximum, and grids


@pytest.mark.parametrize(("per", "group"), [("row", 24), ("group", 8)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_absmax_rounds_to_multiples_of_the_largest_magnitudes_share(per: str, group: int, bits: int) -> None:
    weight = drawn(4, 24)
    layer = AbsMax(bits=bits, per=per, group_size=8).compress(layer_of(weight))
    got = layer.dequantised()
    most = 2 ** (bits - 1) - 1
    for row in range(4):
        for first in range(0, 24, group):
            own = weight[row, first : first + group]
            scale = float((own.abs().max() / most).half())
            for column, w in enumerate(own.tolist()):
                want = max(-most - 1, min(round(w / scale), most)) * scale
                assert abs(float(got[row, first + column]) - want) < 1e-6
    assert layer.zero is None and layer.nbytes == AbsMax(bits=bits, per=per, group_size=8).nbytes(layer_of(weight))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 5), symmetric=st.booleans())
def test_the_best_share_of_a_range_is_no_worse_than_any_other(seed: int, bits: int, symmetric: bool) -> None:
    weight = drawn(3, 20, seed=seed)
    shrinks = (1.0, 0.9, 0.7, 0.5)
    found = fit_least(weight, bits, 8, shrinks, lambda change: squares(change, 8), symmetric=symmetric)
    least = squares(found.nearest(weight) - weight, 8)
    for shrink in shrinks:
        other = fit(weight, bits, 8, symmetric=symmetric, shrink=shrink)
        assert bool((least <= squares(other.nearest(weight) - weight, 8) * (1 + 1e-5)).all())


# -- against an independent library


@pytest.mark.parametrize("bits", [4, 3])
def test_errors_are_no_larger_than_those_of_llm_compressor(bits: int) -> None:
    """The file holds a feed-forward layer's weight [48, 144], the statistics of what entered it while a small random
    Llama with uneven channels read 16 x 96 random tokens, and what llm-compressor 0.14 made of the layer through its
    `oneshot` on these tokens: rounding to nearest, GPTQ (damping 0.01, no activation order) and AWQ (20 steps; `duo`:
    scales also by the weights' own size), all with groups of 48 and zero points. It rounds on the grids of the original
    weight, and holds scales at float32.
    """
    held = load_file(ORACLE)
    weight = held["weight"]
    inputs = InputStats(
        int(held["tokens"]), *(held[name] for name in ("mean", "absmean", "absmax", "square", "moment"))
    )

    def error(made: Tensor) -> float:
        return float(inputs.output_error(made - weight).sum())

    def ours(method: Quantiser) -> float:
        layer = method.compress(layer_of(weight), inputs)
        assert isinstance(layer, PackedLinear)
        return error(layer.dequantised())

    theirs = {name: error(made) for name, made in held.items() if made.shape == weight.shape and name != "weight"}
    assert ours(RTN(bits=bits, group_size=48)) <= theirs[f"rtn{bits}"] * 1.02
    whole = fit(weight, bits, 48)
    done = gptq(
        weight, inputs.hessian, lambda _, number: Grid(*(part[:, [number]] for part in whole[:2]), bits, 48), 48
    )
    assert error(whole.dequantised(done.codes)) <= theirs[f"gptq{bits}"] * 1.002
    assert ours(GPTQ(bits=bits, group_size=48, act_order=True)) <= theirs[f"gptq{bits}"]
    assert ours(AWQ(bits=bits, group_size=48, clip=False)) <= theirs[f"awq{bits}"] * 1.01
    assert ours(AWQ(bits=bits, group_size=48)) <= min(theirs[f"awq{bits}"], theirs[f"awq{bits}_duo"])
