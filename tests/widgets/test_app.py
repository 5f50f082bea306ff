"""The app without a browser: controls from descriptions, recipes from controls, links, workers, shared models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import workbench as wb
from tests.waiting import until
from tests.widgets.windowed import Windowed
from tests.widgets.workspaces import Ready, now
from workbench.errors import BadParameter, BadRecipe, Cancelled, ModelNotFound, WorkbenchError
from workbench.kv.methods.full import Full
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import Method, Parameter, registered
from workbench.runtime.comparison import Comparison

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")

from workbench_widgets.app.elements.method_form import Menu, MethodForm, control
from workbench_widgets.app.parts.recipe_form import RecipeForm, _description
from workbench_widgets.app.serve import _check_port
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.state.recipe_slots import CACHE_SLOTS, RECIPE_SLOTS, kv_methods
from workbench_widgets.app.state.snippet import snippet
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.app.work.records import Asked
from workbench_widgets.app.work.worker import Worker
from workbench_widgets.app.work.workspace import Workspace

EVERY = [(cls, p) for cls in registered() for p in cls.parameters()]


def another(parameter: Parameter) -> Any:
    """A valid value that is not the default."""
    if parameter.kind == "text":
        return "5-9, 12-20"  # spans of positions, where FITTING names no other
    if parameter.kind == "bool":
        return not parameter.default
    if parameter.kind == "choice":
        return next(choice for choice in parameter.choices or () if choice != parameter.default)
    low = parameter.low if parameter.low is not None else 0
    step = parameter.step or (1 if parameter.kind == "int" else 0.05)
    value = low + step if low + step != parameter.default else low + 2 * step
    return int(value) if parameter.kind == "int" else value


# What has to fit the other parameters, or to be a text of a certain form.
FITTING = {
    ("ziplm", "table"): '{"1536x576": 0.1}',
    ("kivi", "residual"): 64,  # a multiple of the group
    ("kivi", "group"): 64,
    ("kvtuner", "bits"): "8/4 4/2",
    ("kvtuner", "residual"): 64,
    ("kvtuner", "group"): 16,
    ("evopress", "of"): "rtn group_size=32",
    ("evopress", "levels"): "2,3",
}


# -- controls


@pytest.mark.parametrize(("cls", "parameter"), EVERY, ids=lambda item: getattr(item, "key", getattr(item, "name", "")))
def test_every_parameter_has_a_control_with_its_bounds_unit_and_help(cls: type[Method], parameter: Parameter) -> None:
    widget = control(parameter)
    assert widget.value == parameter.default
    assert widget.description == (parameter.help or None)
    assert parameter.name.split("_")[0].lower() in widget.label.lower()
    if parameter.unit:
        assert parameter.unit in widget.label
    if parameter.kind in ("int", "float"):
        assert (widget.start, widget.end) == (parameter.low, parameter.high)
    if parameter.kind == "choice":
        assert tuple(widget.options.values()) == parameter.choices


@pytest.mark.parametrize(("cls", "parameter"), EVERY, ids=lambda item: getattr(item, "key", getattr(item, "name", "")))
def test_a_value_set_in_a_control_arrives_in_the_method(cls: type[Method], parameter: Parameter) -> None:
    changes: list[int] = []
    form = MethodForm(cls, lambda: changes.append(1))
    assert form.method() == cls()
    value = FITTING.get((cls.key, parameter.name)) or another(parameter)
    form.widgets[parameter.name].value = value
    assert getattr(form.method(), parameter.name) == value
    assert form.values == {parameter.name: value}
    assert changes
    assert getattr(MethodForm(cls, lambda: None, form.values).method(), parameter.name) == value


def test_published_values_are_chosen_by_name_in_one_change() -> None:
    changes: list[int] = []
    form = MethodForm(Windowed, lambda: changes.append(1))
    assert form.preset is not None and form.controls[0] is form.preset
    assert list(form.preset.options) == ["the defaults", "paper", "code", "changed"]
    form.preset.value = "code"
    assert (form.method(), changes) == (Windowed(window=8, step=3), [1])
    form.widgets["step"].value = 5
    assert (form.preset.value, form.method()) == ("", Windowed(window=8, step=5))
    form.widgets["step"].value = 3
    assert form.preset.value == "code"
    form.preset.value = "ours"
    assert form.method() == Windowed()
    assert MethodForm(Windowed, lambda: None, {"window": 8, "step": 3}).preset.value == "code"
    assert len(changes) == 4


def test_how_true_a_method_is_to_its_paper_stands_beside_what_it_does() -> None:
    assert "<b>Deviates</b>: MInference is not K-means." in _description(Windowed)
    assert MethodForm(Full, lambda: None).preset is None


def test_choices_that_a_slow_browser_sends_back_do_not_stay() -> None:
    """What Panel's React bridge does when choices change twice before the page is drawn."""
    from bokeh.document import Document

    first, second = {"Maps": {"all": "full"}}, {"Maps": {"all": "full", "kept": "recipe"}}
    menu = Menu(groups=first, value="full")
    model = menu.get_root(Document())
    sent = model.data.options
    menu.groups = second
    both = model.data.options
    assert sent != both
    model.data.options = sent  # from the page: it had not drawn the second yet
    assert model.data.options == both
    assert menu.groups == second


def test_a_method_registered_later_has_its_place_and_its_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.kv.base import KVMethod
    from workbench.registry import _METHODS, param

    class Coin(KVMethod):
        """Keep what a coin says."""

        key, title, claim = "coin", "Coin", "none"
        sides: int = param(2, ge=2, le=6, unit="sides", help="how many")

        def score(self, layer: Any) -> Any:
            raise NotImplementedError

    monkeypatch.setitem(_METHODS, "coin", Coin)
    form = RecipeForm({"kv": "coin"}, {"coin": {"sides": 3}}, lambda: None)
    assert form.recipe("25%").methods[0] == Coin(budget="25%", sides=3)


def test_every_kv_method_can_be_chosen_in_one_place_at_least() -> None:
    places = [cls.key for slot in CACHE_SLOTS for cls in kv_methods(slot)]
    assert set(places) == {cls.key for cls in registered("kv")}


def test_what_only_scores_anew_while_decoding_stands_beside_any_scorer() -> None:
    assert [cls.key for cls in kv_methods("evict")] == ["decoding"]
    assert not {"decoding"} & {cls.key for cls in kv_methods("kv")}
    assert {"prefixkv", "lagkv", "h2o"} <= {cls.key for cls in kv_methods("kv")}  # these score, or share out, too
    recipe = chosen(kv="keydiff", evict="decoding").recipe("25%")
    assert [method.key for method in recipe.methods] == ["keydiff", "decoding"] and str(recipe.budget) == "0.25"
    assert [method.key for method in chosen(kv="full", evict="decoding").recipe("25%").methods] == ["decoding"]
    state = PageState(kv="keydiff", evict="decoding", values={"decoding": {"every": 64}})
    assert state.query() == "?kv=keydiff&evict=decoding&values=%7B%22decoding%22%3A+%7B%22every%22%3A+64%7D%7D"


# -- recipes


def chosen(**keys: str) -> RecipeForm:
    return RecipeForm(keys, {}, lambda: None)


def test_one_method_takes_the_budget_itself_and_several_share_it() -> None:
    assert chosen(kv="snapkv").recipe("25%") == Recipe.of("snapkv", budget=0.25)
    both = chosen(kv="snapkv", store="kivi").recipe("8MiB")
    assert [method.key for method in both.methods] == ["snapkv", "kivi"]
    assert str(both.budget) == "8 MiB"


def test_the_full_cache_gives_way_to_a_storage_method_and_takes_no_budget_alone() -> None:
    alone = chosen(kv="full")
    assert not alone.takes_budget
    assert alone.recipe("25%") == Recipe.of("full")
    assert chosen(kv="full", store="kivi").recipe("50%") == Recipe.of("kivi", budget=0.5)


def test_weights_and_attention_join_the_recipe() -> None:
    recipe = chosen(kv="full", weights="hqq", attention="memory-efficient").recipe("25%")
    assert [method.key for method in recipe.methods] == ["full", "hqq", "memory-efficient"]
    assert recipe.budget is None


def test_contradictions_are_one_clear_error() -> None:
    form = chosen(store="kivi", kv="full")
    form.slots["store"].form.widgets["residual"].value = 100  # type: ignore[union-attr]
    with pytest.raises(BadParameter, match="multiple of group"):
        form.recipe("25%")


def test_parameters_are_there_again_when_a_method_is_chosen_again() -> None:
    form = chosen(kv="snapkv")
    slot = form.slots["kv"]
    slot.form.widgets["window"].value = 7  # type: ignore[union-attr]
    slot.select.value = "h2o"
    slot.select.value = "snapkv"
    assert slot.form.values == {"window": 7}  # type: ignore[union-attr]


# -- links and code


def test_a_fresh_page_needs_no_query_and_a_query_brings_everything_back() -> None:
    assert PageState().query() == ""
    state = PageState(
        example="",
        text="Ä & b = c?\nd",
        kv="h2o",
        store="kivi",
        values={"h2o": {"recent_share": 0.25}},
        budget="8MiB",
        question="why & how?",
        tokens=48,
        layer=3,
        head=1,
        tab=2,
    )
    from urllib.parse import parse_qsl

    assert PageState.read(dict(parse_qsl(state.query().removeprefix("?"), keep_blank_values=True))) == state


def test_a_broken_link_opens_the_default_page() -> None:
    assert PageState.read({"values": "{not json", "tokens": "many", "layer": "-1", "other": "x"}) == PageState()
    assert PageState.read({"values": '["list"]'}).values == {}
    form = RecipeForm({"kv": "no-such", "store": "no-such"}, {"snapkv": {"window": 9}}, lambda: None)
    assert set(form.keys()) == set(RECIPE_SLOTS)
    assert form.recipe("25%")


def test_a_long_text_of_ones_own_stays_out_of_the_link() -> None:
    assert "text" not in PageState(example="", text="x" * 5000).query()


def test_the_python_of_a_page_runs_the_same_recipe(tiny_llama: Any, byte_tokenizer: Any, monkeypatch: Any) -> None:
    recipe = Recipe.of([wb.method("snapkv", window=8), wb.method("kivi", bits=4)], budget="50%")
    code = snippet(
        model="any", example=None, text='a "quoted"\ntext ' * 20, recipe=recipe, question="what?", max_new_tokens=3
    )
    session = wb.Session((tiny_llama, byte_tokenizer))
    monkeypatch.setattr(wb, "Session", lambda model: session)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["run"].recipe == recipe
    assert found["run"].question == "what?"
    assert len(found["run"].tokens) <= 3
    assert len([line for line in code.splitlines() if line]) == 5


# -- workers


def test_a_worker_keeps_only_the_latest_of_what_waits() -> None:
    worker, hold, done = Worker("test", now), threading.Event(), []

    def slow(progress: Progress) -> str:
        hold.wait(10)
        return "first"

    worker.submit(slow, done.append, done.append)
    for name in ("second", "third", "fourth"):
        worker.submit(lambda progress, name=name: name, done.append, done.append)
    hold.set()
    until(lambda: not worker.busy)
    assert done == ["first", "fourth"]


def test_an_interrupted_job_is_cancelled_and_forgotten() -> None:
    worker, began, done = Worker("test", now), threading.Event(), []

    def endless(progress: Progress) -> str:
        began.set()
        while True:
            progress.check()
            time.sleep(0.005)

    worker.submit(endless, done.append, done.append)
    assert began.wait(5)
    worker.submit(lambda progress: "next", done.append, done.append, interrupt=True)
    until(lambda: not worker.busy)
    assert done == ["next"]


def test_cancelling_tells_so_and_the_lane_goes_on() -> None:
    worker, began, failed, done = Worker("test", now), threading.Event(), [], []

    def endless(progress: Progress) -> None:
        began.set()
        while True:
            progress.update("spinning", 1, 2)
            time.sleep(0.005)

    worker.submit(endless, done.append, failed.append)
    assert began.wait(5)
    worker.cancel()
    until(lambda: not worker.busy)
    assert [type(error) for error in failed] == [Cancelled]
    worker.submit(lambda progress: 1, done.append, failed.append)
    until(lambda: done == [1])


def test_an_unexpected_error_is_told_in_one_line_and_the_lane_goes_on(caplog: Any) -> None:
    worker, failed, done = Worker("reading", now), [], []
    worker.submit(lambda progress: 1 / 0, done.append, failed.append)
    until(lambda: not worker.busy)
    assert isinstance(failed[0], WorkbenchError)
    assert "reading failed: ZeroDivisionError" in str(failed[0])
    assert "division" in caplog.text


def test_a_closed_lane_tells_nobody_anything() -> None:
    worker, hold, done = Worker("test", now), threading.Event(), []
    worker.submit(lambda progress: hold.wait(10), done.append, done.append)
    worker.close()
    hold.set()
    worker.submit(lambda progress: "late", done.append, done.append)
    until(lambda: not worker.busy)
    assert done == []


# -- models


def test_a_model_is_loaded_once_for_all_who_ask(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    from workbench.models import LoadedModel, facts

    def load(name: str, progress: Progress) -> LoadedModel:
        loads.append(name)
        progress.update("load", 0, 1)
        time.sleep(0.2)
        return LoadedModel(tiny_llama, None, name, facts(tiny_llama))

    monkeypatch.setattr("workbench.models.load", load)
    models, got = LoadedModels(), []
    threads = [threading.Thread(target=lambda: got.append(models.get("a", Progress()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["a"]
    assert len({id(model) for model in got}) == 1
    assert models.get("a", Progress()) is got[0]


def test_a_model_that_cannot_be_loaded_is_tried_again() -> None:
    models = LoadedModels()
    for _ in range(2):
        with pytest.raises(ModelNotFound, match="no model"):
            models.get("no such model", Progress())


# -- workspaces


@pytest.fixture
def workspace(tiny_llama: Any, byte_tokenizer: Any) -> Any:
    made = Workspace(now, Ready(tiny_llama, byte_tokenizer))
    yield made
    made.close()


TEXT = "the needle lies under the stone " * 6


def test_reading_planning_running_and_asking_on(workspace: Any) -> None:
    workspace.read("tiny", TEXT)
    until(lambda: workspace.reading is not None)
    workspace.make_plan(Recipe.of("snapkv", budget=0.5), interrupt=True)
    until(lambda: workspace.plan is not None)
    assert workspace.plan.share <= 0.5
    workspace.generate(Recipe.of("snapkv", budget=0.5), Asked("where?", 4))
    until(lambda: workspace.run is not None and not workspace.working)
    first = workspace.run
    workspace.ask_on(Asked("and then?", 3))
    until(lambda: workspace.run is not first and not workspace.working)
    assert list(workspace.rows.question) == ["where?", "where? → and then?"]
    assert list(workspace.rows.run) == [1, 2]


def test_a_budget_too_small_is_a_notice_and_the_last_plan_stays(workspace: Any) -> None:
    workspace.read("tiny", TEXT)
    until(lambda: workspace.reading is not None)
    workspace.make_plan(Recipe.of("snapkv", budget=0.5), interrupt=True)
    until(lambda: workspace.plan is not None)
    before = workspace.plan
    workspace.make_plan(Recipe.of("snapkv", budget=0.0001), interrupt=False)
    until(lambda: workspace.refusal != "")
    assert "smallest" in workspace.refusal
    assert workspace.plan is before
    workspace.make_plan(Recipe.of("snapkv", budget=0.6), interrupt=False)
    until(lambda: workspace.plan is not before)
    assert workspace.refusal == ""


def test_a_failed_reading_keeps_what_was_there(workspace: Any) -> None:
    workspace.read("tiny", TEXT)
    until(lambda: workspace.reading is not None)
    before = workspace.reading
    for model, text, said in (("tiny", "  ", "empty"), ("missing", "x", "no model")):
        workspace.read(model, text)
        until(lambda said=said: said in workspace.problem)
    assert workspace.reading is before


def test_comparing_adds_a_row_for_each_run_and_says_what_cannot_be_done(workspace: Any) -> None:
    workspace.read("tiny", TEXT)
    until(lambda: workspace.reading is not None)
    recipes = [Recipe.of("full"), Recipe.of("knorm"), Recipe.of("kivi")]
    budgets = ["50%", "0.1%"]
    cases = [Recipe.of(r, budget=b) for r, b in Comparison.of(recipes, budgets).cases]
    workspace.compare(cases, Asked(None, 2))
    until(lambda: not workspace.working and len(workspace.rows) == 5)
    assert workspace.rows.error.notna().sum() == 2
    assert workspace.rows.kl.iloc[0] < 1e-6


def test_the_share_of_scores_has_a_column_once_a_run_has_an_attention_method(workspace: Any) -> None:
    from workbench_widgets.app.panels.runs import RunsPanel

    panel = RunsPanel(workspace, lambda *_: None, lambda _: None, lambda: None)
    panel.show(True)
    workspace.read("tiny", TEXT)
    until(lambda: workspace.reading is not None)
    for key, hidden in (("snapkv", ["host_mib", "score_share"]), ("streaming-window", ["host_mib"])):
        before = len(workspace.rows)
        workspace.generate(Recipe.of(key, budget=0.5), Asked(None, 2))
        until(lambda before=before: len(workspace.rows) > before and not workspace.working)
        assert panel.table.hidden_columns[: len(hidden)] == hidden
    shares = panel.table.value["score_share"].tolist()
    assert shares[0] == 1 and 0.3 < shares[1] <= 0.5


def test_two_sharing_a_model_never_meet(workspace: Any, tiny_llama: Any) -> None:
    other = Workspace(now, workspace._models)
    workspace.read("tiny", TEXT)
    other.read("tiny", TEXT[::-1])
    until(lambda: workspace.reading is not None and other.reading is not None)
    assert workspace.reading.session.model is other.reading.session.model
    assert workspace.reading.session is not other.reading.session
    workspace.generate(Recipe.of("knorm", budget=0.5), Asked("a?", 3))
    other.generate(Recipe.of("full"), Asked("b?", 3))
    until(lambda: len(workspace.rows) == 1 and len(other.rows) == 1)
    assert workspace.run.question == "a?"
    assert other.run.question == "b?"
    other.close()
    assert workspace.reading is not None


# -- attention


@pytest.fixture
def attention(workspace: Any) -> Any:
    """The Attention tab in view, of a prompt with a plan."""
    from workbench_widgets.app.panels import AttentionPanel

    made = AttentionPanel(workspace)
    made.show(True)
    workspace.read("tiny", TEXT)
    # The prompt's own refresh runs on another thread here: it must be over before a head is chosen.
    until(lambda: made.map.label != "" and not workspace.looking.busy and not workspace.surveying.busy)
    workspace.selected = (0, 1)
    workspace.recipe = Recipe.of("snapkv", budget=0.5)
    workspace.make_plan(workspace.recipe, interrupt=True)
    until(lambda: workspace.plan is not None and not workspace.looking.busy and not workspace.surveying.busy)
    return made


def choose_to_show(panel: Any, start: str) -> None:
    panel.shows.value = next(value for name, value in panel.choices.items() if name.startswith(start))
    until(lambda: not panel.workspace.looking.busy and not panel.workspace.surveying.busy)


def test_the_attention_tab_shows_a_head_what_its_tokens_receive_and_all_heads(attention: Any) -> None:
    assert attention.map.label == "Attention of layer 0, head 1"
    assert attention.text.label == "Attention received, layer 0, head 1"
    assert attention.grid.tiles
    assert attention.grid.classes
    assert attention.grid.selected == (0, 1)
    attention.grid.selected = (1, 2)  # a click
    until(lambda: attention.map.label == "Attention of layer 1, head 2")
    assert attention.workspace.selected == (1, 2)
    assert (attention.layer.value, attention.head.value) == (1, 2)


def test_an_operators_implied_attention_is_shown_with_its_error(attention: Any) -> None:
    import numpy as np

    from workbench_widgets.views.wire import unpack

    session = attention.workspace.reading.session
    for start, against in (("SLAB", False), ("SLAB (simplified linear attention) − all keys", True)):
        choose_to_show(attention, start)
        made = session.operator("slab", 0, 1, pixels=512)
        wanted = made.implied.minus(made.exact).values if against else made.implied.values
        np.testing.assert_allclose(np.nan_to_num(unpack(attention.map.exact)), wanted, atol=1e-6)
        assert "implied by slab" in attention.map.label
        assert attention.map.diverging == against
        assert f"{float(made.error[1]):.0%} of its norm" in attention._remark.object and attention._remark.visible
    choose_to_show(attention, "InLine")
    assert attention.map.diverging  # its weights may be negative
    choose_to_show(attention, "all keys")
    assert not attention._remark.visible


def test_an_operators_parameters_are_its_controls_and_stay_as_they_were_left(attention: Any) -> None:
    import numpy as np

    from workbench_widgets.views.wire import unpack

    assert not attention._parameters.visible
    choose_to_show(attention, "SOFT")
    assert set(attention.form.widgets) == {p.name for p in wb.method("soft").parameters()}
    before = unpack(attention.map.exact)
    attention.form.widgets["landmarks"].value = 3
    until(lambda: attention.map.label.endswith("landmarks=3") and not attention.workspace.looking.busy)
    made = attention.workspace.reading.session.operator("soft", 0, 1, landmarks=3)
    shown = np.nan_to_num(unpack(attention.map.exact))
    np.testing.assert_allclose(shown, made.implied.values, atol=1e-6)
    assert not np.allclose(shown, np.nan_to_num(before))
    choose_to_show(attention, "SOFT − all keys")
    assert attention.form.widgets["landmarks"].value == 3 and attention.map.diverging
    choose_to_show(attention, "all keys")
    assert not attention._parameters.visible and attention.form is None
    choose_to_show(attention, "SOFT")
    assert attention.form.widgets["landmarks"].value == 3


def test_a_map_that_takes_long_says_how_far_it_is_and_begins_again_after_it_was_cancelled(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, session = attention.workspace, attention.workspace.reading.session
    monkeypatch.setattr("workbench_widgets.app.work.workspace._SOON_S", 0)
    real, asked = session.attention, []

    def endless(*args: Any, progress: Progress, **kwargs: Any) -> Any:
        while True:
            progress.update("attending", 1, 4)
            time.sleep(0.005)

    monkeypatch.setattr(session, "attention", endless)
    attention.pooling.value = "mean"
    until(lambda: attention.doing.body.visible and attention.doing.bar.value == 25)
    attention.doing.cancel.clicks += 1
    until(lambda: not workspace.looking.busy and not attention.doing.body.visible)
    monkeypatch.setattr(session, "attention", lambda *a, **k: (asked.append(k["pooling"]), real(*a, **k))[1])
    attention.show(False)
    attention.show(True)
    until(lambda: asked == ["mean"] and not workspace.looking.busy)
    assert not attention.doing.body.visible


def test_a_difference_of_recipes_is_what_the_session_says(attention: Any) -> None:
    import numpy as np

    from workbench_widgets.views.wire import unpack

    workspace = attention.workspace
    session = workspace.reading.session
    choose_to_show(attention, "snapkv 0.5 − all keys")
    assert attention.map.diverging
    assert attention.grid.diverging
    assert attention.map.label == "Difference in attention of layer 0, head 1, snapkv 0.5 − all keys"
    wanted = session.attention(0, 1, workspace.recipe).minus(session.attention(0, 1)).values.numpy()
    np.testing.assert_array_equal(unpack(attention.map.exact), wanted)
    assert abs(wanted).max() > 0
    choose_to_show(attention, "all keys")
    assert not attention.map.diverging


def test_a_run_can_be_what_a_recipe_is_compared_to(attention: Any) -> None:
    workspace = attention.workspace
    workspace.generate(Recipe.of("knorm", budget=0.5), Asked(None, 2))
    until(lambda: workspace.run is not None and not workspace.working)
    choose_to_show(attention, "snapkv 0.5 − run of knorm 0.5")
    assert attention.map.label.endswith("snapkv 0.5 − knorm 0.5")


def test_an_attention_methods_own_weights_are_shown_and_said_to_be_so(attention: Any) -> None:
    import numpy as np

    from workbench_widgets.views.wire import unpack

    workspace = attention.workspace
    sparse = wb.method("block-sparse", budget=0.5)
    for recipe, said in ((sparse | wb.method("knorm", budget=0.5), "before knorm drops"), (Recipe.of(sparse), "")):
        workspace.recipe = recipe
        workspace.make_plan(recipe, interrupt=True)
        until(lambda recipe=recipe: workspace.plan is not None and f"under {recipe.label}" in str(attention.choices))
        choose_to_show(attention, f"attention under {recipe.label}")
        until(
            lambda recipe=recipe: attention.map.label.endswith(f"under {recipe.label}") and not workspace.surveying.busy
        )
        wanted = workspace.reading.session.attention(0, 1, sparse).values.numpy()
        np.testing.assert_array_equal(np.nan_to_num(unpack(attention.map.exact)), wanted)
        assert said in attention._remark.object and attention._remark.visible == bool(said)


def test_heads_whose_weights_take_long_to_find_wait_to_be_asked_for(attention: Any, monkeypatch: Any) -> None:
    workspace = attention.workspace
    entries = 3 * 4 * workspace.reading.trace.tokens**2
    monkeypatch.setattr("workbench_widgets.app.panels.attention._AT_ONCE", 3 * entries)
    for key, waits in (("streaming-window", True), ("masformer", False)):
        workspace.recipe = Recipe.of(key, budget=0.7)
        workspace.make_plan(workspace.recipe, interrupt=True)
        until(lambda key=key: f"under {key}" in str(attention.choices))
        choose_to_show(attention, "attention under")
        until(lambda waits=waits: attention.survey.visible == waits)


def test_what_was_looked_at_is_not_computed_again(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = attention.workspace
    session = workspace.reading.session
    asked: list[str] = []
    for name in ("attention", "attention_grid", "heads", "received"):
        real = getattr(session, name)
        monkeypatch.setattr(session, name, lambda *a, _n=name, _r=real, **k: (asked.append(_n), _r(*a, **k))[1])
    before = attention.map.knots
    attention.scale.value = "linear"
    until(lambda: attention.map.knots != before and not workspace.looking.busy)
    choose_to_show(attention, "keys kept")
    assert sorted(asked) == ["attention", "attention_grid", "heads", "received"]
    choose_to_show(attention, "all keys")
    choose_to_show(attention, "snapkv 0.5 −")
    workspace.make_plan(Recipe.of("snapkv", budget=0.5), interrupt=True)
    until(lambda: not workspace.planning.busy and not workspace.looking.busy)
    assert len(asked) == 4


def test_a_long_prompts_heads_wait_to_be_asked_for_and_can_be_cancelled(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench_widgets.app.panels.attention._AT_ONCE", 0)
    workspace = attention.workspace
    workspace.read("tiny", TEXT + "more")
    until(lambda: attention.survey.visible)
    assert not attention.grid.visible
    began, session = threading.Event(), workspace.reading.session

    def endless(*args: Any, progress: Progress, **kwargs: Any) -> Any:
        began.set()
        while True:
            progress.update("attention maps", 1, 4)
            time.sleep(0.005)

    with monkeypatch.context() as patch:
        patch.setattr(session, "attention_grid", endless)
        attention.survey.clicks += 1
        assert began.wait(5)
        until(lambda: attention.survey.label == "Attention maps …" and attention.survey.disabled)
        workspace.cancel()
        until(lambda: attention.survey.label == "Show all heads" and not attention.survey.disabled)
        until(lambda: not workspace.surveying.busy)
    attention.survey.clicks += 1
    until(lambda: attention.grid.visible and not workspace.surveying.busy)
    assert not attention.survey.visible


def test_what_comes_when_the_tab_was_left_is_shown_when_one_comes_back(attention: Any) -> None:
    workspace = attention.workspace
    hold, real = threading.Event(), workspace.reading.session.received
    workspace.reading.session.received = lambda *a, **k: (hold.wait(10), real(*a, **k))[1]
    workspace.selected = (1, 1)
    attention.show(False)
    hold.set()
    until(lambda: not workspace.looking.busy)
    assert attention.map.label == "Attention of layer 0, head 1"
    attention.show(True)
    until(lambda: attention.map.label == "Attention of layer 1, head 1")


# -- starting


def test_a_page_that_is_made_for_a_socket_alone_finds_its_style_sheets_here(workspace: Any) -> None:
    from bokeh.document import Document
    from bokeh.models import ImportedStyleSheet
    from panel.io.state import set_curdoc

    from workbench_widgets.app.page import page

    doc = Document()
    with set_curdoc(doc):
        page(OfferedModels("tiny"), LoadedModels()).server_doc(doc)
    found = {sheet.url for root in doc.roots for sheet in root.select({"type": ImportedStyleSheet})}
    assert found and not [url for url in found if "://" in url]


def test_a_page_is_built_without_a_model_or_a_warning() -> None:
    from workbench_widgets.app.page import Page

    page = Page(OfferedModels("none-yet"), LoadedModels())
    assert page.state == PageState()
    assert "wb.method('snapkv', budget=0.25)" in page.python()


def test_what_is_read_before_the_page_is_drawn_is_shown_when_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from bokeh.document import Document
    from bokeh.server.callbacks import NextTickCallback
    from panel.io.state import set_curdoc, state

    from workbench_widgets.app.page import Page
    from workbench_widgets.app.work import worker

    drawn: list[Callable[[], None]] = []
    monkeypatch.setattr(type(state), "onload", lambda self, ready: drawn.append(ready))
    monkeypatch.setattr(worker, "_APPLIED_S", 0.1)  # nobody takes in what was read until later
    doc = Document()
    with set_curdoc(doc):
        page = Page(OfferedModels("workbench-tiny"), LoadedModels())
    page.begin()  # its browser has connected
    try:
        until(lambda: not page.workspace.main.busy)
        assert page.workspace.reading is None and not doc.session_callbacks
        drawn[0]()
        for turn in doc.session_callbacks:
            if isinstance(turn, NextTickCallback):
                turn.callback()
        assert page.workspace.reading is not None and page.workspace.model == "workbench-tiny"
    finally:
        page.workspace.close()


@pytest.mark.parametrize("port", [-1, 70000, "80", True])
def test_a_port_that_is_none_is_refused(port: Any) -> None:
    with pytest.raises(BadParameter, match="port"):
        _check_port("127.0.0.1", port)


def test_a_port_in_use_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadParameter, match=f"port {taken.getsockname()[1]}.*choose another"):
            _check_port("127.0.0.1", taken.getsockname()[1])


def test_recipes_that_make_no_sense_are_errors_of_ours() -> None:
    form = chosen(kv="adakv", allocate="pyramidkv")
    from workbench.kv.base import Stages

    with pytest.raises(BadRecipe, match="allocate"):
        Stages.of(form.recipe("25%").methods)  # type: ignore[arg-type]


def test_progress_that_arrives_after_the_outcome_is_not_shown() -> None:
    posted: list[Any] = []
    told: list[str] = []
    worker = Worker("late", posted.append, None, lambda stage, done, total: told.append(stage))
    finished = threading.Event()

    def work(progress: Progress) -> int:
        progress.update("on the way", 1, 2)
        finished.set()
        return 1

    worker.submit(work, lambda result: told.append("done"), lambda error: None)
    assert finished.wait(5)
    until(lambda: len(posted) == 2)
    for late in reversed(posted):  # the page takes the outcome first
        late()
    assert told == ["done"]
