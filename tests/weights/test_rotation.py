"""Rotations that change nothing by themselves, and what rounding gains by them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import workbench as wb
from tests.weights.support import IDS, logits
from workbench.core.hadamard import matrix, order, rotate, unrotate, whole
from workbench.errors import BadRecipe, NotApplicable
from workbench.measure import space_used
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.compress import compressed
from workbench.weights.layers.rotated import RotatedLinear
from workbench.weights.methods.quantise.ostquant import OSTQuant
from workbench.weights.solvers.quantisation_grid import fit
from workbench.weights.surgery.rotation import DecoderRotation, LayerRotation, balance, rotated_linear
from workbench.weights.surgery.sharing_copy import sharing_copy
from workbench.weights.survey import Survey

SHORT = Calibration(SAMPLED, samples=8, tokens=32)
ROTATABLE = ("llama", "mqa", "mha", "qwen2", "qwen3", "mistral", "phi3")


def shaken(architecture: str, layers: int = 2) -> PreTrainedModel:
    """A tiny model whose norms and biases are not ones and zeros."""
    model, draw = tiny(architecture, layers=layers), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                shift = 0.3 * torch.randn(parameter.shape, generator=draw)
                parameter.add_(shift.exp() - 1 if "norm" in name else shift)
    return model


def squares_of(seen: dict[str, InputStats]) -> dict[str, Tensor]:
    return {name: stats.square for name, stats in seen.items()}


def rotated(model: PreTrainedModel, *, scaling: bool = True) -> PreTrainedModel:
    """A copy with every weight rotated and scaled, and none rounded."""
    twin = sharing_copy(model)
    decoder = DecoderRotation(twin)
    signs = decoder.signs(0)
    for block, seen in WeightStudy(model, calibration=SHORT).inputs(hessians=False):
        for name, rotation in decoder.rotations(block, signs, squares_of(seen) if scaling else None).items():
            made = rotated_linear(model.get_submodule(name), rotation)
            twin.set_submodule(name, RotatedLinear(made) if name.endswith("down_proj") else made)
    decoder.rotate_ends(twin, signs)
    return twin


# --- Hadamard matrices


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 192, 576, 896, 960])
def test_hadamard_matrices_are_what_they_are_called(size: int) -> None:  # trap W2
    assert whole(size)
    found = matrix(size)
    torch.testing.assert_close(found.abs(), torch.full_like(found, 1 / math.sqrt(size)))  # nothing but plus and minus
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "want"),
    [(4096, (1, 4096)), (11008, (1, 256)), (14336, (28, 512)), (18944, (148, 128)), (6, (1, 2)), (7, (1, 1))],
)
def test_sizes_without_a_matrix_are_rotated_in_blocks_of_a_power_of_two(size: int, want: tuple[int, int]) -> None:
    assert order(size) == want
    assert whole(size) == (want[0] * want[1] == size)


@given(size=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rotations_keep_lengths_and_are_undone(size: int, seed: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    there = rotate(x)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(unrotate(there), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there, x @ matrix(size).float(), rtol=1e-4, atol=1e-5)
    assert rotate(x.bfloat16()).dtype == torch.bfloat16


# --- The transformation alone


@pytest.mark.parametrize("architecture", ROTATABLE)
@pytest.mark.parametrize("scaling", [True, False])
def test_the_transformation_alone_changes_no_logits(architecture: str, scaling: bool) -> None:  # trap W1
    model = shaken(architecture)
    want = logits(model)
    twin = rotated(model, scaling=scaling)
    assert float((logits(twin) - want).norm() / want.norm()) < 1e-5
    changed = twin.get_submodule("model.layers.0.mlp.down_proj").dequantised()
    assert not torch.allclose(changed, model.get_submodule("model.layers.0.mlp.down_proj").weight, atol=1e-2)


def test_the_original_and_its_tied_table_are_not_touched() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = compressed(model, [OSTQuant(bits=8, group_size=16)])
    assert twin.lm_head.weight is twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        error = (twin(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert float(error) < 0.02
    assert "lm_head" in OSTQuant().left_alone(model) and "model.embed_tokens" in OSTQuant().left_alone(model)


@pytest.mark.parametrize("architecture", ["gemma3", "mixtral", "qwen3-moe"])
def test_models_that_cannot_be_rotated_are_refused_with_the_reason(architecture: str) -> None:  # trap W10
    with pytest.raises(NotApplicable, match=r"cannot be rotated in .*model\.layers\.0"):
        compressed(tiny(architecture), [OSTQuant()])


def test_what_is_compressed_already_cannot_be_rotated() -> None:
    with pytest.raises(BadRecipe, match="they both choose how weights are held"):
        compressed(tiny("llama"), [wb.weights.RTN(), OSTQuant()])


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_hessians_of_rotated_inputs_follow_from_the_original_ones(architecture: str) -> None:
    model = shaken(architecture)
    twin = rotated(model)
    decoder, signs = DecoderRotation(model), DecoderRotation(model).signs(0)
    for (block, seen), (_, there) in zip(
        WeightStudy(model, calibration=SHORT).inputs(hessians=True),
        WeightStudy(twin, calibration=SHORT).inputs(hessians=True),
        strict=True,
    ):
        for name, rotation in decoder.rotations(block, signs, squares_of(seen)).items():
            if name.endswith("down_proj"):
                continue  # a layer of its own kind, which calibration does not listen to
            want = there[name].hessian
            torch.testing.assert_close(
                rotation.hessian(seen[name].hessian), want, rtol=1e-3, atol=1e-4 * float(want.max())
            )


def test_balanced_channels_cost_least() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(32, generator=draw) * 4, torch.rand(32, generator=draw)
    factor = balance(inputs, weights)

    def cost(s: Tensor) -> float:  # what errors spread evenly over rotated channels cost
        return float((inputs / s.square()).sum() * (s.square() * weights).sum())

    assert float(factor.log().mean()) == pytest.approx(0, abs=1e-6)
    assert all(cost(factor) <= cost(factor * (0.2 * torch.randn(32, generator=draw)).exp()) for _ in range(50))
    assert cost(factor) < 0.9 * cost(torch.ones(32))


# --- Rounding after it


def test_rotation_spreads_outliers_so_that_rounding_loses_less() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=draw)
    weight[:, 5] *= 30  # a channel that spoils its groups' scales
    one = torch.ones(64, dtype=torch.float64)
    rotation = LayerRotation(one, one, 64)
    moved = rotation.weight(weight)

    def error(of: Tensor) -> float:
        return float((fit(of, 4, 32).nearest(of) - of).square().sum())

    assert error(moved) < 0.5 * error(weight)


def test_space_used_is_that_of_the_ellipsoid_in_its_cube() -> None:
    ball = (math.pi / 4) ** 0.5  # a disc in its square
    assert space_used(3 * torch.eye(2)) == pytest.approx(ball)
    # Half axes 2 and 1: an ellipse of 2 pi in a square of side 4.
    assert space_used(torch.diag(torch.tensor([4.0, 1.0]))) == pytest.approx((2 * math.pi / 16) ** 0.5)
    # Turned by 45 degrees it is the same ellipse, in a square of side 2 sqrt(2.5).
    root = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    spun = root @ torch.diag(torch.tensor([4.0, 1.0])) @ root.T
    assert space_used(spun) == pytest.approx((2 * math.pi / 10) ** 0.5)
    assert space_used(torch.diag(torch.tensor([1.0, 0.0]))) == 0


def test_more_of_the_space_is_used_once_outlier_channels_are_rotated() -> None:
    x = torch.randn(400, 48, generator=torch.Generator().manual_seed(0))
    x[:, [4, 20]] *= 20
    hessian, one = x.T @ x / len(x), torch.ones(48, dtype=torch.float64)
    assert space_used(LayerRotation(one, one, 48).hessian(hessian)) > 3 * space_used(hessian)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_bytes_are_foretold_with_signs_and_moved_biases(architecture: str) -> None:
    model = shaken(architecture)
    method = OSTQuant(group_size=32)
    survey = Survey.of(model, method)
    twin = compressed(model, [method])
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    live = tensor_bytes(t for t in (*twin.parameters(), *twin.buffers()) if id(t) not in shared)
    assert live == survey.nbytes


def test_gptq_beats_rounding_to_nearest_and_few_bits_of_activations_cost_something() -> None:
    model = shaken("llama", layers=3)
    want = logits(model)

    def error(**parameters: object) -> float:
        return float((logits(compressed(model, [OSTQuant(bits=3, group_size=32, **parameters)])) - want).norm())

    assert error(rounding="gptq") < error(rounding="nearest")
    assert error(input_bits=4) > error(input_bits=8) > 0


def test_answers_go_on_over_compressed_caches() -> None:
    session = wb.Session((shaken("llama", layers=1), None))
    session.read(IDS)
    run = session.run(
        [wb.kv.SnapKV(budget=0.5, window=8), OSTQuant(bits=8)], question=torch.tensor([5, 6]), max_new_tokens=4
    )
    assert len(run.tokens) == 4 and run.plan.nbytes <= 0.5 * run.plan.full_nbytes
    assert run.ask(torch.tensor([7, 8]), max_new_tokens=2).tokens


def test_only_plain_layers_hide_behind_a_rotation() -> None:
    draw = torch.Generator().manual_seed(0)
    inner = nn.Linear(36, 5, bias=False)
    layer, x = RotatedLinear(inner), torch.randn(4, 36, generator=draw)
    torch.testing.assert_close(layer(x), x @ layer.dequantised().T, rtol=1e-4, atol=1e-5)
