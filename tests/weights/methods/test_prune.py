"""Pruning of single weights: exactly as many stay as fit, those that the papers choose, and the rest is really gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.weights.support import correlated, drawn, stats_of
from workbench.errors import BudgetTooSmall
from workbench.measure.memory import tensor_bytes
from workbench.models import tiny
from workbench.weights.bases.pruner import Pruner
from workbench.weights.calibration.hessian import InputStats
from workbench.weights.compress import compressed
from workbench.weights.layers import SparseLinear, sparse_nbytes
from workbench.weights.methods.prune.magnitude import Magnitude
from workbench.weights.methods.prune.sparsegpt import SparseGPT, sparsegpt
from workbench.weights.methods.prune.wanda import Wanda
from workbench.weights.solvers.compensation import removal_cost
from workbench.weights.solvers.inverse_hessian import inverse_factor
from workbench.weights.solvers.sparsity import Pattern, largest, largest_by_row, largest_in_groups
from workbench.weights.survey import Survey

METHODS = (Magnitude, Wanda, SparseGPT)
DATA = Path(__file__).parents[1] / "data"


# -- layers


@pytest.mark.parametrize("columns", [16, 21, 64])
def test_sparse_layers_hold_a_bitmap_and_the_values_and_nothing_else(columns: int) -> None:
    weight, bias = drawn(5, columns).half().float(), nn.Parameter(drawn(5, seed=3))
    kept = drawn(5, columns, seed=4) > 0.5
    layer = SparseLinear(weight, kept, bias)
    assert torch.equal(layer.dequantised(), weight * kept)
    assert torch.equal(layer.kept, kept)
    x = drawn(3, columns, seed=5)
    torch.testing.assert_close(layer(x), x @ (weight * kept).T + bias)
    assert layer.nbytes == tensor_bytes(layer.buffers()) == sparse_nbytes(5, columns, int(kept.sum()))
    assert layer.describe()["density"] == int(kept.sum()) / kept.numel()
    for first in range(5):
        assert torch.equal(layer.rows(first, first + 1, torch.float32), (weight * kept)[first : first + 1])


def test_rows_with_equally_many_weights_need_no_offsets() -> None:
    kept = largest_in_groups(drawn(6, 16), "2:4")
    layer = SparseLinear(drawn(6, 16).bfloat16(), kept)
    assert layer.offsets is None and layer.values.dtype == torch.bfloat16
    assert layer.nbytes == sparse_nbytes(6, 16, 48, even=True) == 9 * 6 * 16 * 2 // 16
    assert torch.equal(layer.rows(2, 4, torch.float32), (drawn(6, 16).bfloat16().float() * kept)[2:4])


@pytest.mark.parametrize("kept", [torch.zeros(3, 9, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)])
def test_layers_without_any_weight_or_with_all_of_them_work(kept: Tensor) -> None:
    weight = drawn(3, 9).half().float()
    assert torch.equal(SparseLinear(weight, kept).dequantised(), weight * kept)


# -- which weights stay


@pytest.mark.parametrize("count", [0, 1, 7, 11, 12])
def test_exactly_as_many_stay_as_asked_whatever_ties(count: int) -> None:  # trap W5
    for scores in (torch.ones(3, 4), torch.zeros(3, 4), torch.tensor([[2.0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 3, 0]])):
        for kept in (largest(scores, count), largest_by_row(scores, count)):
            assert int(kept.sum()) == count
        lowest_kept = scores[largest(scores, count)].min() if count else torch.inf
        assert not (scores[~largest(scores, count)] > lowest_kept).any()
    per_row = largest_by_row(torch.ones(3, 4), count).sum(dim=1)
    assert int(per_row.max() - per_row.min()) <= 1


@pytest.mark.parametrize(("pattern", "count", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_in_every_group(method: type[Pruner], pattern: str, count: int, of: int) -> None:
    model = tiny("llama")
    asked = method(pattern=pattern)
    twin = compressed(model, [asked])
    survey = Survey.of(model, asked)
    assert survey.nbytes * 16 == survey.full_nbytes * 9
    for name in survey.linears:
        layer = twin.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        assert bool((layer.kept.unflatten(1, (-1, of)).sum(dim=2) == count).all())


def test_columns_that_are_no_whole_groups_are_left_alone_with_the_reason() -> None:
    survey = Survey.of(nn.Sequential(nn.Linear(10, 8), nn.Linear(16, 8)), Magnitude(pattern="4:8"))
    assert list(survey.linears) == ["1"] and "10 columns are no whole groups of 8" in survey.left["0"]


def test_magnitude_compares_within_the_whole_layer(tiny_llama: PreTrainedModel) -> None:
    twin = compressed(tiny_llama, [Magnitude(budget=0.4)])
    for name, linear in Survey.of(tiny_llama, Magnitude()).linears.items():
        layer, sizes = twin.get_submodule(name), linear.weight.abs()
        assert isinstance(layer, SparseLinear)
        assert float(sizes[layer.kept].min()) >= float(sizes[~layer.kept].max())


def test_wanda_keeps_what_plain_loops_over_the_papers_score_keep() -> None:
    weight, x = drawn(6, 32), correlated(50, 32)
    kept = Wanda().prune(weight, 6 * 16, stats_of(x))[1]
    for row in range(6):
        scores = [abs(float(weight[row, j])) * float(x[:, j].double().norm()) for j in range(32)]
        best = sorted(range(32), key=lambda j: scores[j], reverse=True)[:16]
        assert set(kept[row].nonzero().flatten().tolist()) == set(best)


def loops(weight: Tensor, moment: Tensor, damping: float, kept_of: int) -> tuple[Tensor, Tensor]:
    """SparseGPT with one column a block and the inverse found anew for every column, straight from the paper."""
    weight = weight.double().clone()
    damped = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(len(moment))
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for group in range(0, weight.shape[1], 4):
        for row in range(weight.shape[0]):
            costs = []
            for j in range(group, group + 4):  # the inverse of what is left when column j comes
                inverse = torch.linalg.inv(damped[j:, j:])
                costs.append(float(weight[row, j] ** 2 / inverse[0, 0]))
            for j in sorted(range(4), key=lambda j: costs[j], reverse=True)[:kept_of]:
                kept[row, group + j] = True
        for j in range(group, group + 4):
            inverse = torch.linalg.inv(damped[j:, j:])
            for row in range(weight.shape[0]):
                if not kept[row, j]:
                    weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
    return weight * kept, kept


def test_removing_a_weight_costs_what_is_left_once_those_to_its_right_have_made_up_for_it() -> None:
    weight, moment = drawn(4, 6), stats_of(drawn(50, 6, seed=1)).hessian
    found = removal_cost(weight, inverse_factor(moment, 1e-9).diagonal())
    wide = moment.double()
    for row in range(4):
        for j in range(6):
            rest, change = list(range(j + 1, 6)), torch.zeros(6, dtype=torch.float64)
            change[j] = -weight[row, j].double()
            change[rest] = -change[j] * torch.linalg.solve(wide[rest][:, rest], wide[rest, j])
            assert float(found[row, j]) == pytest.approx(float(change @ wide @ change), rel=1e-3)


def test_sparsegpt_computes_what_plain_loops_over_the_paper_do() -> None:
    weight, moment = drawn(5, 16), stats_of(correlated(40, 16)).hessian
    want, kept = loops(weight, moment, 0.01, 2)
    for block in (8, 16, 128):
        got, places = sparsegpt(weight, inverse_factor(moment, 0.01), 40, "2:4", block)
        assert torch.equal(places, kept)
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_what_stays_makes_up_for_what_goes() -> None:
    weight, inputs = drawn(24, 64), stats_of(correlated(400, 64))
    corrected, kept = SparseGPT().prune(weight, 768, inputs)
    assert int(kept.sum()) == 768 and not bool(corrected[~kept].any())
    same_places = inputs.output_error(weight * kept - weight).sum()
    assert inputs.output_error(corrected - weight).sum() < 0.85 * same_places


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(pattern: str) -> None:
    weight, inputs = drawn(32, 128), stats_of(correlated(600, 128))
    errors = []
    for method in METHODS:
        pruned, kept = method(pattern=pattern).prune(weight, weight.numel() // 2, inputs)
        errors.append(float(inputs.output_error(pruned * kept - weight).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_sparsegpt_without_any_calibration_token_is_magnitude() -> None:
    nothing = InputStats(0, *(torch.zeros(32) for _ in range(4)), accumulated=torch.zeros(32, 32))
    weight = drawn(8, 32)
    corrected, kept = SparseGPT(block=32).prune(weight, 100, nothing)
    assert torch.equal(kept, largest(weight.abs(), 100))
    assert torch.equal(corrected, weight * kept)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_as_the_budget_grows(method: type[Pruner]) -> None:
    weight, inputs = drawn(16, 64), stats_of(correlated(300, 64))
    errors = []
    for count in (64, 256, 512, 900, 1023, 1024):
        pruned, kept = method().prune(weight, count, inputs)
        errors.append(float(inputs.output_error(pruned * kept - weight).sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 < errors[-2]


# -- bytes


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5625, 0.999, "60kB"])
def test_as_many_weights_stay_as_the_budget_pays_for(tiny_llama: PreTrainedModel, budget: float | str) -> None:
    method = Magnitude(budget=budget)
    survey, twin = method.survey(tiny_llama), compressed(tiny_llama, [method])
    held = 0
    limit = 60_000 / survey.full_nbytes if isinstance(budget, str) else budget
    for name, linear in survey.linears.items():
        layer = twin.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        room = limit * 2 * linear.weight.numel()
        assert room - 4 * (linear.out_features + 1) - 4 < layer.nbytes <= room
        held += layer.nbytes
    assert held <= survey.nbytes <= limit * survey.full_nbytes


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_budget_leaves_every_layer_as_it_is(tiny_llama: PreTrainedModel, method: type[Pruner]) -> None:
    twin = compressed(tiny_llama, [method(budget=1.0)])
    assert all(one is other for one, other in zip(twin.parameters(), tiny_llama.parameters(), strict=True))


def test_less_than_the_bitmap_is_refused_with_the_smallest_size(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(BudgetTooSmall) as refusal:
        compressed(tiny_llama, [Magnitude(budget=0.05)])
    assert 0.0625 < refusal.value.smallest < 0.12
    compressed(tiny_llama, [Magnitude(budget=refusal.value.smallest)])
    with pytest.raises(BudgetTooSmall):
        compressed(tiny_llama, [Magnitude(pattern="2:4", budget=0.5)])


# -- against an independent library (data/pruning_oracle.py says how its part was made)


@pytest.fixture(scope="module")
def oracle() -> tuple[Tensor, InputStats, dict[str, Tensor]]:
    """A feed-forward weight [48, 144], what entered it, and what llm-compressor makes of it with half the weights."""
    held = load_file(DATA / "weight_oracle.safetensors")
    names = ("mean", "absmean", "absmax", "square", "moment")
    inputs = InputStats(int(held["tokens"]), *(held[name] for name in names))
    return held["weight"], inputs, load_file(DATA / "pruning_oracle.safetensors")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_wanda_keeps_the_very_weights_that_llm_compressor_does(
    oracle: tuple[Tensor, InputStats, dict[str, Tensor]], pattern: Pattern
) -> None:
    weight, inputs, theirs = oracle
    pruned, kept = Wanda(pattern=pattern).prune(weight, weight.numel() // 2, inputs)
    assert torch.equal(pruned * kept, theirs[f"wanda {pattern}"])  # no two scores of a row are equal here


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_sparsegpt_keeps_and_corrects_as_llm_compressor_does(
    oracle: tuple[Tensor, InputStats, dict[str, Tensor]], pattern: Pattern
) -> None:
    weight, inputs, theirs = oracle
    corrected, kept = SparseGPT(pattern=pattern).prune(weight, weight.numel() // 2, inputs)
    assert torch.equal(kept, theirs[f"sparsegpt {pattern}"] != 0)
    torch.testing.assert_close(corrected * kept, theirs[f"sparsegpt {pattern}"], rtol=1e-4, atol=1e-6)


def test_sparsegpt_without_a_pattern_differs_from_llm_compressor_by_what_that_prunes_too_many(
    oracle: tuple[Tensor, InputStats, dict[str, Tensor]],
) -> None:
    weight, inputs, theirs = oracle
    corrected, kept = SparseGPT().prune(weight, weight.numel() // 2, inputs)
    their = theirs["sparsegpt unstructured"]
    missing = kept & (their == 0)  # it drops all up to its threshold: one more in each of the two blocks (trap W5)
    assert int(kept.sum()) == weight.numel() // 2 and bool(kept[their != 0].all())
    assert missing[:, :128].sum() == missing[:, 128:].sum() == 1
    assert inputs.output_error(corrected - weight).sum() <= inputs.output_error(their - weight).sum()
