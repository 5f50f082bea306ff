"""Levels of a method, where a search of few generations begins, and what a module loses at each width."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.weights.support import correlated, drawn, layer_of, seeded, stats_of
from workbench.budget import Budget
from workbench.core.evolution import exchanges, filled, promising, total, uniform
from workbench.errors import BadParameter
from workbench.models import tiny
from workbench.progress import Progress
from workbench.weights import AWQ, EvoPress, compressed
from workbench.weights.calibration.level_search import fittest
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import SAMPLED, Calibration
from workbench.weights.levels import level_name, levels_of, sizes_of
from workbench.weights.solvers.activation_scales import clipped
from workbench.weights.solvers.module_levels import errors_of
from workbench.weights.solvers.quantisation_grid import fit
from workbench.weights.survey import Survey

SIZES = torch.tensor([[1, 3, 6], [2, 3, 9], [1, 2, 4], [3, 5, 6]])


def test_levels_are_bits_of_a_method_that_has_them_and_shares_of_another() -> None:
    assert [level_name(m) for m in levels_of("me", "rtn group_size=32", "8,3", None)] == ["8 bits", "3 bits"]
    assert [level_name(m) for m in levels_of("me", "gptq", "", None)] == ["2 bits", "3 bits", "4 bits", "8 bits"]
    shares = levels_of("me", "svd", "", Budget.parse(0.9))
    assert [m.effective_budget.amount for m in shares if m.effective_budget] == [0.7, 0.8, 0.9, 1.0]
    linears = {"one": layer_of(drawn(8, 32)), "two": layer_of(drawn(16, 64))}
    methods = levels_of("me", "rtn", "2,4", None)
    assert sizes_of(methods, linears).tolist() == [[m.nbytes(x) for m in methods] for x in linears.values()]


@pytest.mark.parametrize("of", ["awq", "quarot", "ostquant", "transact", "evopress", "bitstack"])
def test_layers_that_only_make_sense_together_are_no_levels_and_the_refusal_says_why(of: str) -> None:
    with pytest.raises(BadParameter, match=f"the layers of {of} cannot be switched one by one: .{{10,}}") as refusal:
        levels_of("me", of, "", None)
    assert "\n" not in str(refusal.value)


def test_evopress_searches_over_awq_that_holds_its_own_scales() -> None:
    model = tiny("llama")
    study = WeightStudy(model, calibration=Calibration(SAMPLED, samples=3, tokens=24))
    method = EvoPress(of="awq group_size=32 fold=false", budget=0.25, generations=1, offspring=2, texts=2, tokens=24)
    twin = compressed(model, [method], study=lambda *_: study)
    survey = Survey.of(model, method)
    assert sum(twin.get_submodule(name).nbytes for name in survey.linears) <= 0.25 * survey.full_nbytes
    chosen = method.profile(model, study).levels
    assert len(set(chosen.values())) > 1
    for name in list(chosen)[:3]:  # the layers are those that awq makes of each alone
        bits = int(chosen[name].split()[0])
        alone = compressed(model, [AWQ(bits=bits, group_size=32, fold=False)], study=lambda *_: study)  # type: ignore[arg-type]
        x = drawn(5, twin.get_submodule(name).in_features)
        assert torch.equal(twin.get_submodule(name)(x), alone.get_submodule(name)(x))


def test_a_search_begins_with_the_least_unfit_of_the_exchanges_that_it_measures() -> None:
    even, limit = torch.tensor([1, 1, 1, 1]), int(SIZES[:, 1].sum()) + 4
    slopes = torch.tensor([[0.1, -3.0], [0.2, -0.5], [0.05, -0.4], [0.3, -2.0]], dtype=torch.float64)
    way = exchanges(even, slopes, SIZES, limit)
    measured: list[list[int]] = []
    unfit = {tuple(levels.tolist()): 5.0 + place for place, levels in enumerate(way)}

    def measure(levels: Tensor) -> float:
        measured.append(levels.tolist())
        return unfit[tuple(levels.tolist())]

    assert way and torch.equal(promising(even, 9.0, slopes, SIZES, limit, measure), torch.tensor(measured[0]))
    assert torch.equal(promising(even, 1.0, slopes, SIZES, limit, measure), even)
    assert all(total(torch.tensor(levels), SIZES) <= limit for levels in measured)


@pytest.mark.parametrize("slopes", [0, 2])
def test_a_search_is_never_worse_than_one_level_everywhere(slopes: int) -> None:
    limit = 17
    target = torch.tensor([2, 0, 2, 1])

    def divergence(levels: Tensor, texts: Any) -> float:
        return float((levels - target).square().sum()) + len(texts) * 0.01

    def steep(levels: Tensor, texts: Any, progress: Progress) -> Tensor:
        found = torch.full((4, 2), torch.inf, dtype=torch.float64)
        for part in range(4):
            for side, step in enumerate((-1, 1)):
                moved = levels.clone()
                moved[part] += step
                if 0 <= moved[part] < 3:
                    found[part, side] = divergence(moved, texts) - divergence(levels, texts)
        return found

    trial: Any = SimpleNamespace(texts=4, divergence=divergence, slopes=steep)
    even = filled(uniform(SIZES, limit), SIZES, limit, seeded(3))
    found = fittest(
        trial, SIZES, limit, slopes=slopes, generations=20, offspring=8, seed=3, progress=Progress()
    )  # fmt: skip
    assert found.before == divergence(even, range(4)) >= found.unfitness == divergence(found.levels, range(4))
    assert torch.equal(found.levels, target) and total(found.levels, SIZES) <= limit


def test_what_a_module_loses_at_its_widths_is_read_from_the_order_of_its_removal() -> None:
    modules: Any = [SimpleNamespace(name="a", width=4), SimpleNamespace(name="b", width=3)]
    removals: Any = {name: SimpleNamespace(errors=drawn(5, seed=seed)) for seed, name in enumerate("ab")}
    levels = [[4, 2, 1], [3, 2, 0]]
    want = [[float(removals[m.name].errors[m.width - w]) for w in row] for m, row in zip(modules, levels, strict=True)]
    assert errors_of(modules, levels, removals).tolist() == want


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_clipped_range_is_chosen_only_in_rows_whose_output_is_the_better_for_it(symmetric: bool) -> None:
    weight, x = drawn(12, 48), correlated(300, 48)
    weight[:6, ::16] *= 6  # outliers, which stretch the grids of their groups
    inputs, whole = stats_of(x), fit(weight, 3, 16, symmetric=symmetric, every_level=True)
    found = clipped(weight, inputs, whole, symmetric=symmetric)
    assert (found.bits, found.group) == (3, 16)

    def losses(grid: Any) -> Tensor:
        return ((grid.nearest(weight) - weight).double() @ x.double().T).square().mean(dim=1)

    changed = (found.scale != whole.scale).any(dim=1) | (found.zero != whole.zero).any(dim=1)
    assert changed.any() and (losses(found)[changed] < losses(whole)[changed]).all()
    assert torch.equal(found.nearest(weight)[~changed], whole.nearest(weight)[~changed])
