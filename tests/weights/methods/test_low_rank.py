"""Low-rank weights: the closest of their rank, and feed-forward modules that never hold all their activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import workbench as wb
from tests.weights.support import RANDOM_IDS, logits
from workbench.errors import BadBudget, BudgetTooSmall
from workbench.measure.memory import LiveBytes
from workbench.models import tiny
from workbench.weights import SVD, FlashSVD, compressed
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.layers.streamed_mlp import StreamedMLP, activation_name
from workbench.weights.solvers.low_rank import truncated


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_no_product_of_that_rank_is_closer(rank: int) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(rank))
    down, up = truncated(weight, rank)
    lost = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()  # Eckart and Young
    assert down.shape == (rank, 12) and up.shape == (20, rank)
    assert float((weight - up @ down).norm()) == pytest.approx(float(lost), abs=1e-5)


def test_every_layer_gets_the_largest_rank_within_the_share_and_the_error_falls_with_it() -> None:
    model, errors = tiny("llama"), []
    for share in (0.3, 0.6, 0.9, 1.0):
        twin, lost = compressed(model, [SVD(budget=share)]), 0.0
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head" and share < 1:
                outputs, inputs = layer.weight.shape
                thin = twin.get_submodule(name)
                assert isinstance(thin, LowRankLinear)
                assert thin.rank * (outputs + inputs) <= share * outputs * inputs < (thin.rank + 1) * (outputs + inputs)
                lost += float((layer.weight - thin.up.float() @ thin.down.float()).norm())
        errors.append(lost)
    assert torch.equal(logits(twin, RANDOM_IDS), logits(model, RANDOM_IDS))  # at a share of 1
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mistral"])
@pytest.mark.parametrize("tile", [8, 33, 4096])
def test_tiles_give_what_whole_layers_give(architecture: str, tile: int) -> None:
    model = tiny(architecture)
    plain, streamed = (compressed(model, [m]) for m in (SVD(budget=0.7), FlashSVD(budget=0.7, tile=tile)))
    assert any(isinstance(module, StreamedMLP) for module in streamed.modules())
    torch.testing.assert_close(logits(streamed, RANDOM_IDS), logits(plain, RANDOM_IDS), rtol=1e-4, atol=1e-4)


def test_wide_activations_never_exist_as_a_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    gate, up = (LowRankLinear(*truncated(torch.randn(2048, 64, generator=draw), 16)) for _ in range(2))
    down = LowRankLinear(*truncated(torch.randn(64, 2048, generator=draw), 16))
    module, x = StreamedMLP(gate, up, down, nn.SiLU(), 128), torch.randn(1024, 64, generator=draw)
    with torch.no_grad(), LiveBytes() as live:
        module(x)
    whole = 1024 * 2048 * 4
    assert live.peak < whole / 4  # one activation of the whole prompt; plain computing holds three


def test_modules_of_another_form_compute_layer_by_layer() -> None:
    twin = compressed(tiny("phi3"), [FlashSVD(budget=0.7)])  # gate and up are one matrix there
    assert not any(isinstance(module, StreamedMLP) for module in twin.modules())
    assert bool(logits(twin, RANDOM_IDS).isfinite().all())


def test_activations_are_known_by_their_numbers() -> None:
    known = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
    assert {name: activation_name(ACT2FN[name]) for name in known} == known
    assert [activation_name(x) for x in (nn.PReLU(), nn.Tanh(), None)] == [None] * 3


def test_a_share_without_any_rank_is_refused_with_the_smallest_one() -> None:
    model = tiny("llama")
    with pytest.raises(BudgetTooSmall, match="no rank at all") as refusal:
        compressed(model, [SVD(budget=0.01)])
    compressed(model, [SVD(budget=refusal.value.smallest)])
    with pytest.raises(BadBudget, match="share of each layer's bytes"):
        wb.method("svd", budget="1MiB")
