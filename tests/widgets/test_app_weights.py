"""The Weights tab, the slider of weights and answers that follow it, without a browser."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from tests.waiting import until
from tests.widgets.workspaces import Ready, now
from workbench.errors import BadBudget
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import registered

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")

from workbench_widgets import weight_views
from workbench_widgets.app.panels import WeightsPanel
from workbench_widgets.app.panels.weight_sections import SECTIONS
from workbench_widgets.app.parts.budget_bar import BudgetBar
from workbench_widgets.app.parts.recipe_form import RecipeForm
from workbench_widgets.app.work.records import Asked
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.views.wire import unpack

TEXT = "the needle lies under the stone " * 4
STACK = wb.weights.BitStack(budget=0.3, rank=2, blocks=4)


@pytest.fixture
def workspace(tiny_llama: Any, byte_tokenizer: Any, tmp_path: Any, monkeypatch: Any) -> Any:
    """A text that was read by a tiny model, calibrated on little."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))

    made = Workspace(now, Ready(tiny_llama, byte_tokenizer))
    made.read("tiny", TEXT)
    until(lambda: made.reading is not None)
    made.reading.session.calibrate("sampled", samples=4, tokens=32)
    yield made
    made.close()


def plan(workspace: Any, *methods: Any, **budget: Any) -> None:
    """Plan a recipe, and wait for it."""
    recipe = Recipe.of(list(methods), **budget)
    before = workspace.plan
    workspace.recipe = recipe
    workspace.make_plan(recipe, interrupt=True)
    until(lambda: workspace.plan is not before and not workspace.planning.busy)


def settle(workspace: Any) -> None:
    until(lambda: not any(worker.busy for worker in (workspace.main, workspace.planning, workspace.weighing)))


# -- budgets


def test_there_is_a_slider_for_methods_whose_size_can_be_chosen_and_for_no_others() -> None:
    sized = {
        cls.key for cls in registered("weights") if issubclass(cls, wb.weights.WeightMethod) and cls.takes_budget()
    }
    assert {"bitstack", "double-rounding", "svd", "wanda"} <= sized
    assert not sized & {"rtn", "gptq", "awq", "hqq"}


def test_the_weights_budget_goes_to_the_weight_method_and_to_it_alone() -> None:
    form = RecipeForm({"kv": "snapkv", "weights": "bitstack"}, {}, lambda: None)
    recipe = form.recipe("25%", "40%")
    assert recipe.budget == wb.method("snapkv", budget=0.25).budget
    (method,) = recipe.family("weights")
    assert method.budget == wb.method("bitstack", budget=0.4).budget
    assert form.recipe("25%").family("weights")[0].budget is None
    with pytest.raises(BadBudget, match="parsecs"):
        form.recipe("25%", "5 parsecs")


def test_the_slider_begins_at_a_methods_own_budget_and_another_methods_begins_anew(workspace: Any) -> None:
    moved: list[str] = []
    bar = BudgetBar(workspace, "25%", "", lambda: None, lambda: moved.append(bar.weights))
    bar.offer(wb.weights.BitStack)
    assert bar.of_weights.body.visible
    assert (bar.of_weights.slider.value, bar.weights) == (30, "")
    bar.of_weights.slider.value = 45
    assert moved == ["45%"] and bar.of_weights.exact.value == "45%"
    bar.offer(wb.weights.BitStack)
    assert bar.weights == "45%"
    bar.offer(wb.weights.SVD)
    assert (bar.of_weights.slider.value, bar.weights) == (80, "")
    bar.offer(wb.weights.GPTQ)
    assert not bar.of_weights.body.visible and bar.weights == ""
    assert moved == ["45%"]  # what was set by itself told nobody


def test_a_link_brings_the_weights_budget_back(workspace: Any) -> None:
    bar = BudgetBar(workspace, "25%", "2MiB", lambda: None, lambda: None)
    bar.offer(wb.weights.BitStack)
    assert bar.weights == "2MiB"


def test_the_models_megabytes_are_those_of_the_compressed_model(workspace: Any) -> None:
    plan(workspace, "full")
    whole = workspace.weights
    assert whole.methods == () and whole.deployed_nbytes == 2 * workspace.reading.session.facts.parameters
    assert whole.nbytes == whole.full_nbytes == workspace.reading.session.memory.samples[0].categories["weights"]
    plan(workspace, "full", STACK)
    small = workspace.weights
    census = workspace.reading.session.census(STACK, outputs=False)
    vectors = sum(2 * p.numel() for p in workspace.reading.session.model.parameters() if p.ndim < 2)
    assert small.deployed_nbytes == census.bytes.sum() + vectors
    assert small.deployed_nbytes < small.full_deployed_nbytes == whole.full_deployed_nbytes
    assert small.nbytes < small.full_nbytes == whole.full_nbytes


def test_another_size_of_a_stack_is_had_without_compressing_again(workspace: Any, monkeypatch: Any) -> None:
    plan(workspace, "full", STACK)
    first = workspace.weights.nbytes
    monkeypatch.setattr(
        "workbench.weights.methods.any_size.bitstack.decompose", lambda *a: pytest.fail("it was compressed again")
    )
    for budget in (0.5, 0.2, 0.3):
        plan(workspace, "full", STACK.with_budget(budget))
        assert workspace.refusal == ""
    assert workspace.weights.nbytes == first


# -- answers that follow


def test_an_answer_follows_and_only_the_last_is_kept(workspace: Any) -> None:
    plan(workspace, "full", STACK)
    for budget in (0.2, 0.4):
        recipe = Recipe.of(["full", STACK.with_budget(budget)])
        workspace.follow(recipe, Asked("where?", 200 if budget == 0.2 else 3))
    settle(workspace)
    assert len(workspace.rows) == 1
    assert workspace.run.recipe.family("weights")[0].budget.amount == 0.4
    assert workspace.problem == ""


def test_following_gives_way_to_what_a_person_asked_for(workspace: Any) -> None:
    plan(workspace, "full")
    workspace.generate(Recipe.of("full"), Asked("a?", 30))
    workspace.follow(Recipe.of("full"), Asked("b?", 3))
    settle(workspace)
    assert list(workspace.rows.question) == ["a?"]


def test_what_follows_is_dropped_silently_when_something_moves_again(workspace: Any) -> None:
    plan(workspace, "full")
    workspace.follow(Recipe.of("full"), Asked("a?", 400))
    until(lambda: bool(workspace.answer))
    workspace.stop_following()
    settle(workspace)
    assert workspace.rows.empty and workspace.answer == () and workspace.problem == ""
    workspace.follow(Recipe.of("full"), Asked("b?", 2))  # and it goes on
    settle(workspace)
    assert list(workspace.rows.question) == ["b?"]


# -- the tab


@pytest.fixture
def weights(workspace: Any) -> Any:
    """The Weights tab in view, under a stack of bits."""
    made = WeightsPanel(workspace)
    made.show(True)
    plan(workspace, "full", STACK)
    settle(workspace)
    return made


def choose(panel: Any, section: str, **choices: Any) -> None:
    for name, value in choices.items():
        getattr(panel, name).value = value
    panel.section.value = section
    settle(panel.workspace)


def test_errors_of_every_layer_and_module_are_those_of_the_census(weights: Any) -> None:
    session = weights.workspace.reading.session
    census = session.census(STACK)
    inside = census[census.layer.notna()]
    shown = unpack(weights.map.exact)
    assert shown.shape == (session.facts.layers, inside.module.nunique())
    assert weights.map.column_labels == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    np.testing.assert_allclose(shown.ravel(), inside.output_error.to_numpy(float), rtol=1e-5)
    assert weights.table.value.name.tolist() == census.name.str.removeprefix("model.").tolist()
    weights.measure.value = "bits"
    settle(weights.workspace)
    np.testing.assert_allclose(unpack(weights.map.exact).ravel(), inside.bits.to_numpy(float), rtol=1e-5)


def test_only_what_a_method_chose_can_be_shown(weights: Any) -> None:
    assert "rank" not in weights.measure.options.values()
    plan(weights.workspace, "full", wb.weights.SVD(budget=0.5))
    settle(weights.workspace)
    assert "rank" in weights.measure.options.values()


def test_a_cell_that_is_clicked_shows_its_singular_values_before_and_after(weights: Any) -> None:
    weights.map.selected = (1, 3)
    settle(weights.workspace)
    assert weights.section.value == "spectra"
    assert (weights.layer.value, weights.module.value) == (1, "self_attn.o_proj")
    figure = weights.figures[0].object
    session = weights.workspace.reading.session
    for trace, model in zip(figure.data, (None, STACK), strict=True):
        (wanted,) = session.spectra(model, layer=1, module="self_attn.o_proj").spectra
        np.testing.assert_allclose(trace.y, wanted.values.double() * wanted.largest, rtol=1e-6)
    assert [trace.name for trace in figure.data] == ["before", "after"]


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_outliers_stand_before_and_after(weights: Any, kind: str) -> None:
    choose(weights, "outliers", kind=kind, layer=1, module="mlp.down_proj")
    by_layer, by_channel = (pane.object for pane in weights.figures)
    session = weights.workspace.reading.session
    for number, recipe in enumerate((None, STACK)):
        frame = session.outliers(kind, recipe)
        if kind == "weights":
            frame = frame[frame.module == "mlp.down_proj"]
        own = frame[frame.layer == 1].absmax
        np.testing.assert_allclose(by_channel.data[number].y, own)
        assert by_layer.data[2 * number].y[1] == pytest.approx(own.max())
    assert not np.allclose(by_channel.data[0].y, by_channel.data[1].y)


def test_rounding_is_what_the_session_says(weights: Any) -> None:
    choose(weights, "rounding", module="mlp.up_proj")
    kernel, space = (pane.object for pane in weights.figures)
    frame = weights.workspace.reading.session.rounding(STACK)
    own = frame[frame.module == "mlp.up_proj"]
    np.testing.assert_allclose(kernel.data[2].y, own.kernel)
    np.testing.assert_allclose(space.data[1].y, own.space)


def test_which_layer_hurts_waits_to_be_asked_for(weights: Any) -> None:
    choose(weights, "sensitivity")
    assert weights.start.visible and not weights.figures[0].visible
    weights.start.clicks += 1
    settle(weights.workspace)
    by_layer, by_module = (pane.object for pane in weights.figures)
    frame = weights.workspace.reading.session.sensitivity(STACK)
    np.testing.assert_allclose(by_layer.data[0].y, frame[frame.layer.notna()].kl, rtol=1e-4)
    np.testing.assert_allclose(by_module.data[0].y, frame[frame.layer.isna()].kl, rtol=1e-4)
    choose(weights, "layers")
    choose(weights, "sensitivity")  # known by now
    assert weights.figures[0].visible and not weights.start.visible


def test_a_look_at_weights_can_be_cancelled_and_a_run_does_not_wait_for_it(weights: Any, monkeypatch: Any) -> None:
    workspace = weights.workspace
    began = threading.Event()

    def endless(*args: Any, progress: Progress, **kwargs: Any) -> Any:
        began.set()
        while True:
            progress.update("measuring layers", 1, 4)
            time.sleep(0.005)

    monkeypatch.setattr(workspace.reading.session, "sensitivity", endless)
    choose(weights, "sensitivity")
    for stop in (lambda: setattr(weights.doing.cancel, "clicks", weights.doing.cancel.clicks + 1), None):
        began.clear()
        weights.start.clicks += 1
        assert began.wait(20)
        until(lambda: weights.doing.body.visible and weights.doing.bar.value == 25)
        if stop is None:
            workspace.generate(Recipe.of("full"), Asked("a?", 2))
        else:
            stop()
        settle(workspace)
        assert weights.start.visible and not weights.doing.body.visible
    assert len(workspace.rows) == 1


def test_a_section_never_shows_what_another_one_showed(weights: Any, monkeypatch: Any) -> None:
    workspace, gone_on = weights.workspace, threading.Event()

    def endless(*args: Any, progress: Progress, **kwargs: Any) -> Any:
        while not gone_on.is_set():
            progress.check()
            time.sleep(0.005)

    monkeypatch.setattr(workspace.reading.session, "rounding", endless)
    assert weights.map.visible
    weights.section.value = "rounding"
    assert not (weights.map.visible or weights._table_at.visible or weights.numbers.visible)
    assert "being computed" in weights._hint.object and weights._hint.visible
    choose(weights, "sensitivity")  # gives up what nobody waits for any more
    assert weights.start.visible and not weights.doing.body.visible
    choose(weights, "layers")
    assert weights.map.visible and not weights._hint.visible


def test_what_is_asked_for_says_at_once_that_it_has_begun(weights: Any, monkeypatch: Any) -> None:
    silent = threading.Event()
    monkeypatch.setattr(weights.workspace.reading.session, "sensitivity", lambda *a, **k: silent.wait(20))
    choose(weights, "sensitivity")
    weights.start.clicks += 1
    assert weights.doing.body.visible and weights.doing.line.object == "<div>Measuring …</div>"
    weights.doing.cancel.clicks += 1
    silent.set()
    settle(weights.workspace)
    assert weights.start.visible and not weights.doing.body.visible


def test_kinds_of_modules_stand_in_the_models_order(weights: Any) -> None:
    choose(weights, "sensitivity")
    weights.start.clicks += 1
    settle(weights.workspace)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert list(weights.figures[1].object.data[0].x) == order


def test_what_is_left_alone_is_listed_with_the_reason(weights: Any) -> None:
    choose(weights, "left")
    rows = weights.table.value
    left = STACK.left_alone(weights.workspace.reading.session.model)
    assert dict(zip(rows.name, rows.reason, strict=True)) == {k: v for k, v in left.items() if "tied" not in v}
    text = pd.read_csv(weights._csv())
    assert text.reason.tolist() == rows.reason.tolist()


def test_the_plain_models_weights_can_be_looked_at_without_a_method(workspace: Any) -> None:
    panel = WeightsPanel(workspace)
    panel.show(True)
    plan(workspace, "full")
    settle(workspace)
    for name, section in SECTIONS.items():
        choose(panel, name)
        if section.needs_recipe:
            assert "Choose a weight method" in panel._hint.object and panel._hint.visible
        else:
            assert panel.figures[0].visible and not panel._hint.visible, name
    assert len(panel.figures[0].object.data)


def test_names_are_short_where_they_stay_different() -> None:
    assert weight_views.short(["a.q", "b.k"]) == ["q", "k"]
    assert weight_views.short(["a.q", "b.q"]) == ["a.q", "b.q"]
