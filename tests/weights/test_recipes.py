"""Recipes of several weight methods: each is given what those before it left, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, correlated, drawn, layer_of, logits, stats_of
from workbench.core.hadamard import matrix
from workbench.errors import BadRecipe, BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.registry import registered
from workbench.weights import GPTQ, RTN, SVD, Magnitude, QuaRot, SparseGPT, Wanda, WeightMethod, compressed
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.layers import CompactLinear, FactoredLinear, SparseLinear, SparsePackedLinear
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.layers.masked import MaskedLinear
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.stages import STAGES, ordered
from workbench.weights.surgery.opened import closed, opened

SMALL: dict[str, dict[str, Any]] = {  # searches of seconds
    "evopress": {"generations": 1, "offspring": 2, "texts": 2, "tokens": 16, "slopes": 0},
    "cospadi": {"rounds": 2},
}
SHORT = Calibration(SAMPLED, samples=4, tokens=32)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def shortly(model: PreTrainedModel, _: int) -> WeightStudy:
    return WeightStudy(model, calibration=SHORT)


def of_stage(*stages: str) -> list[WeightMethod]:
    methods = [cls(**SMALL.get(cls.key, {})) for cls in registered("weights")]
    return [method for method in methods if isinstance(method, WeightMethod) and method.stage in stages]


def pairs() -> list[tuple[WeightMethod, WeightMethod]]:
    """Every two methods of which one could go on where the other stopped. What makes modules smaller leaves plain
    layers of other sizes; it is tried with one method of each stage.
    """
    before = [(first, then) for first in of_stage("transform", "factor", "select") for then in of_stage(*STAGES[2:])]
    structures = [(first, then) for first in of_stage("structure") for then in (QuaRot(), SVD(), Wanda(), RTN())]
    return [(a, b) for a, b in before + structures if STAGES.index(a.stage) < STAGES.index(b.stage)]


@pytest.mark.parametrize(("first", "then"), pairs(), ids=lambda method: method.key)
def test_every_pair_is_a_model_or_refused_with_the_reason(first: WeightMethod, then: WeightMethod) -> None:
    model = tiny("llama")
    try:
        twin = compressed(model, [then, first], study=shortly)
    except BadRecipe as refusal:
        assert first.key in str(refusal) and then.key in str(refusal)
        assert (first.key, then.key) not in ((a, b) for a in ("svd", "quarot", "wanda") for b in ("gptq", "rtn"))
    except BudgetTooSmall as refusal:
        assert first.stage == "structure" and refusal.smallest <= 1
    else:
        assert bool(logits(twin).isfinite().all())
        assert not any(isinstance(module, MaskedLinear) for module in twin.modules())


# --- What is left for the next


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_pruned_weights_are_opened_and_closed_without_a_change(dtype: torch.dtype) -> None:
    for method, small, plain in ((SVD(), LowRankLinear, FactoredLinear), (Wanda(), SparseLinear, MaskedLinear)):
        model = tiny("llama")
        nn.Module.to(model, dtype)
        twin = compressed(model, [method], study=shortly)
        open_twin = opened(twin)
        again = closed(open_twin)
        assert type(twin.get_submodule(Q_PROJ)) is type(again.get_submodule(Q_PROJ)) is small
        assert type(open_twin.get_submodule(Q_PROJ)) is plain
        assert torch.equal(logits(open_twin), logits(twin)) and torch.equal(logits(again), logits(twin))
        assert tensor_bytes(again.buffers()) == tensor_bytes(twin.buffers())
        assert opened(model) is model and closed(twin) is twin


def test_methods_are_applied_in_the_order_of_their_stages_whatever_the_order_they_are_named_in() -> None:
    model, recipe = tiny("llama"), [RTN(bits=3), Wanda(), SVD(budget=0.9), QuaRot()]
    assert [method.key for method in ordered(recipe)] == ["quarot", "svd", "wanda", "rtn"]
    one, other = (compressed(model, order, study=shortly) for order in (recipe, recipe[::-1]))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([GPTQ(), RTN()], "rtn finds nothing to do behind gptq: they both choose how weights are held"),
        ([Wanda(), Magnitude()], "wanda and magnitude both choose which weights stay: use one of them"),
        ([Wanda(), wb.weights.AWQ()], "awq would fill in what wanda leaves out"),
    ],
)
def test_recipes_that_mean_nothing_are_refused_with_the_reason(methods: list[WeightMethod], words: str) -> None:
    with pytest.raises(BadRecipe, match=words):
        compressed(tiny("llama"), methods, study=shortly)


def test_a_run_says_what_each_method_did_to_what_the_one_before_left() -> None:
    session = wb.Session((tiny("llama"), None))
    session.read(IDS)
    run = session.run([SVD(budget=0.5), RTN()], max_new_tokens=2)
    said = [note for note in run.notes if note.startswith(("svd", "rtn"))]
    assert [note.partition(":")[0] for note in said] == ["svd", "rtn"]
    assert "21 linear layers" in said[0] and "42 linear layers" in said[1]  # two factors each


# --- Pruned weights at few bits


def weights_of(kept: Tensor, seed: int = 0) -> MaskedLinear:
    return MaskedLinear(drawn(*kept.shape, seed=seed) * kept, kept)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_pruned_weights_are_held_as_codes_and_a_bitmap(bits: int, symmetric: bool, even: bool) -> None:
    kept = (torch.arange(40) % 4 < 2).expand(12, 40) if even else drawn(12, 40, seed=3) > 0
    linear, method = weights_of(kept), RTN(bits=bits, group_size=16, symmetric=symmetric)
    layer = method.compress(linear)
    assert isinstance(layer, SparsePackedLinear)
    grid = method.grid(linear.weight)
    want = torch.zeros(12, 40)
    for row in range(12):
        for column in range(40):
            if kept[row, column]:
                scale, zero = float(grid.scale[row, column // 16]), float(grid.zero[row, column // 16])
                code = min(max(round(float(linear.weight[row, column]) / scale) + zero, 0), 2**bits - 1)
                want[row, column] = (code - zero) * scale
    torch.testing.assert_close(layer.dequantised(), want, rtol=1e-4, atol=1e-6)
    for first, last in ((0, 5), (5, 12), (3, 4)):
        assert torch.equal(layer.rows(first, last, torch.float32), layer.dequantised()[first:last])
    assert torch.equal(layer.kept, kept) and layer.nbytes == method.nbytes(linear)
    counted = 12 * 5 + -(-int(kept.sum()) // 8) * bits + 12 * 3 * (2 if symmetric else 3) + (0 if even else 4 * 13)
    assert layer.nbytes == counted


def test_a_layer_that_lost_everything_is_zero() -> None:
    layer = RTN().compress(weights_of(torch.zeros(4, 16, dtype=torch.bool)))
    assert not layer(drawn(3, 16)).any()


@pytest.mark.parametrize("order", [{}, {"act_order": True}, {"group_aware": True}])
def test_gptq_leaves_pruned_weights_at_zero_and_makes_up_for_them(order: dict[str, bool]) -> None:
    """What stays makes up for what goes: nearer to the outputs of the weights before pruning than rounding alone."""
    weight, inputs, kept = drawn(16, 64), stats_of(correlated(400, 64)), drawn(16, 64, seed=5) > 0
    linear = MaskedLinear(weight * kept, kept)
    layer = GPTQ(bits=4, group_size=16, **order).compress(linear, inputs)
    assert isinstance(layer, SparsePackedLinear) and not layer.dequantised()[~kept].any()
    nearest = RTN(bits=4, group_size=16).compress(linear)
    assert isinstance(nearest, SparsePackedLinear)
    ours, theirs = (float(inputs.output_error(x.dequantised() - linear.weight).sum()) for x in (layer, nearest))
    assert ours < theirs


def test_half_of_the_weights_at_four_bits_take_less_than_all_at_three() -> None:
    model = tiny("llama")
    sparse, dense = (
        compressed(model, recipe, study=shortly) for recipe in ([SparseGPT(pattern="2:4"), GPTQ()], [GPTQ(bits=4)])
    )
    assert 0.7 < tensor_bytes(sparse.buffers()) / tensor_bytes(dense.buffers()) < 0.8


# --- Factors at few bits


def test_factors_are_rounded_each_by_itself() -> None:
    twin = compressed(tiny("llama"), [SVD(budget=0.5), RTN(bits=4, group_size=16)], study=shortly)
    whole = compressed(tiny("llama"), [SVD(budget=0.5)], study=shortly)
    made, plain = twin.get_submodule(Q_PROJ), whole.get_submodule(Q_PROJ)
    assert isinstance(made, FactoredLinear) and isinstance(plain, LowRankLinear)
    parts = [RTN(bits=4, group_size=16).compress(layer_of(x.float())) for x in (plain.up, plain.down)]
    assert all(isinstance(part, CompactLinear) for part in parts)
    want = parts[0].dequantised() @ parts[1].dequantised()
    torch.testing.assert_close(made.dequantised(), want, rtol=1e-5, atol=1e-6)
    x = drawn(3, 64)
    torch.testing.assert_close(made(x), x @ want.T, rtol=1e-4, atol=1e-5)
    assert made.nbytes == sum(part.nbytes for part in parts) and made.describe()["rank"] == plain.rank


# --- Rotated weights at few bits


@pytest.mark.parametrize("architecture", ["llama", "mqa", "mha", "qwen2", "qwen3", "mistral", "phi3"])
def test_quarot_alone_changes_no_logits(architecture: str) -> None:  # trap W1
    model = tiny(architecture)
    twin = compressed(model, [QuaRot()], study=shortly)
    assert float((logits(twin) - logits(model)).norm() / logits(model).norm()) < 1e-5
    heads = twin.get_submodule("model.layers.0.self_attn.o_proj").heads
    assert heads == model.config.num_attention_heads


def test_quarot_rotates_across_heads_as_a_kronecker_product() -> None:
    layer = RotatedLinear(layer_of(drawn(6, 24)), heads=4)
    x = drawn(5, 24)
    turned = (x @ torch.kron(matrix(4), torch.eye(6, dtype=torch.float64)).float()) @ layer.inner.weight.T
    torch.testing.assert_close(layer(x), turned, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x @ layer.dequantised().T, turned, rtol=1e-4, atol=1e-5)


def test_outliers_make_a_rotation_worth_its_while() -> None:
    """Single weights far larger than the others of their group coarsen its grid, unless they are spread."""
    model = tiny("llama")
    with torch.no_grad():
        for number, (name, module) in enumerate(model.named_modules()):
            if name.endswith("_proj"):
                module.weight *= 1 + 19 * (drawn(*module.weight.shape, seed=number) > 2.2)
    want = logits(model)
    errors = [
        float((logits(compressed(model, recipe, study=shortly)) - want).norm())
        for recipe in ([QuaRot(), RTN(bits=8)], [RTN(bits=8)])
    ]
    assert errors[0] < 0.9 * errors[1]
