"""How plans, runs and sessions show themselves: as text anywhere, as linked views and a live panel in notebooks."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from tests.waiting import until
from tests.widgets.windowed import Windowed
from workbench import display
from workbench.errors import InputError, MissingExtra, NotRead
from workbench.formatting import mib
from workbench.registry import _METHODS, registered
from workbench_widgets import report
from workbench_widgets.control_panel import Controls
from workbench_widgets.notebook import (
    PLOTLY,
    AttentionView,
    PlanView,
    RunView,
    figure,
    memory_figure,
    results_html,
    runs_html,
)
from workbench_widgets.notebook.latest_job import LatestJob
from workbench_widgets.notebook.method_controls import MethodControls, control
from workbench_widgets.plotly_pictures import figure_png
from workbench_widgets.views import AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText
from workbench_widgets.views.pictures import PNG, png, spans
from workbench_widgets.views.wire import unpack

WIDGET = "application/vnd.jupyter.widget-view+json"
TEXT = "the blue lamp stands by the green door, and nobody knows why it is lit at noon. " * 3


@pytest.fixture
def session(tiny_llama: Any, byte_tokenizer: Any) -> wb.Session:
    made = wb.Session((tiny_llama, byte_tokenizer))
    made.read(TEXT)
    return made


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "in_notebook", lambda: True)


@pytest.fixture
def controls(session: wb.Session) -> Any:
    made = Controls(session, max_new_tokens=4)
    yield made
    made.close()


def kept_share(view: PlanView) -> float:
    """What the raster in the panel really shows."""
    return float((unpack(view.raster.kept) > 0).mean())


def picture(data: dict[str, Any]) -> Any:
    """The still picture of a bundle, which some ink is in and few bytes are."""
    stored = base64.b64decode(data[PNG])
    assert len(stored) < 60_000
    image = Image.open(io.BytesIO(stored)).convert("L")
    dark, light = image.getextrema()
    assert light == 255 and dark < 80
    return image


def test_outside_a_notebook_a_plan_is_text_and_loads_no_widgets():
    code = (
        "import sys, torch, workbench as wb; from workbench.models import tiny\n"
        "s = wb.Session((tiny('llama'), None)); s.read(torch.arange(40))\n"
        "data = s.plan('knorm')._repr_mimebundle_(); s.plan('knorm').show()\n"
        "assert list(data) == ['text/plain'], data\n"
        "assert not {'ipywidgets', 'workbench_widgets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Plan of knorm 0.5 for 40 tokens")


def test_a_notebook_gets_views_with_the_evidence_as_text_and_numbers(session, notebook):
    plan, run = session.plan("knorm", budget=0.5), session.run("knorm", budget=0.5, max_new_tokens=4)
    for thing in (plan, run, session):
        data = thing._repr_mimebundle_()
        assert ("text/html" if thing is session else WIDGET) in data
        assert picture(data).width <= 800
        assert data["text/plain"] == thing.summary()
        json.dumps(data[display.NUMBERS], allow_nan=False)
    assert plan._repr_mimebundle_()[display.NUMBERS]["nbytes"] == plan.nbytes
    assert "KL" in run.summary(), "a shown run has been measured"


def test_a_folder_of_results_is_a_table_of_recipes_and_none_of_its_text_is_markup(tmp_path, notebook):
    results = wb.Results(tmp_path)
    assert "text/html" in results._repr_mimebundle_()
    sizes = {"deployed_nbytes": 3 << 20, "kv_nbytes": 1 << 20}
    results.add(
        {
            "key": f"{n}",
            "status": "done",
            "model": "<b>m",
            "recipe": f"<script>{n}",
            "kl": n / 2,
            "correct": n > 0,
            **sizes,
        }
        for n in range(60)
    )
    data = results._repr_mimebundle_()
    assert picture(data) and data["text/plain"] == results.summary() and data[display.NUMBERS]["done"] == 60
    page = results_html(results)
    assert "<script>" not in page and "<b>m" not in page and "script" in page and "and 10 recipes more" in page
    assert page.count("<tr>") == 51 and "3.00 MiB" in page and "0.500" in page and "100%" in page


def test_showing_a_run_adds_its_memory_as_a_figure_without_the_library(session, notebook):
    run = session.run("full", max_new_tokens=3)
    view, memory = display.bundles(run)
    assert WIDGET in view
    assert set(memory) == {PLOTLY, "text/plain"}, "JupyterLab would draw a picture in place of the figure"
    drawn = figure_png(memory_figure(run.memory, "Memory"))
    assert picture({PNG: base64.b64encode(drawn)}).width <= 800
    assert len(json.dumps(memory)) < 30_000


def test_without_views_there_is_still_text(session, notebook, monkeypatch):
    monkeypatch.setattr(display, "provided", lambda name: None)
    data = session.plan("knorm")._repr_mimebundle_()
    assert set(data) == {"text/plain", display.NUMBERS}
    with pytest.raises(MissingExtra, match="notebooks"):
        session.controls()


def test_the_summary_of_a_plan_tells_its_bytes(session):
    plan = session.plan("streaming-llm", budget=0.25)
    assert f"({plan.share:.1%})" in plan.summary()
    assert f"{plan.counts[0, 0]:,}" in plan.summary()
    assert "nothing read yet" in wb.Session((session.model, session.tokenizer)).summary()


def test_choosing_a_row_of_the_raster_shows_that_head_in_the_text(session):
    plan = session.plan("snapkv", budget=0.3, window=4)
    view = PlanView(plan)
    assert unpack(view.text.levels).dtype == np.float32
    view.raster.selected = (1, 0)
    np.testing.assert_array_equal(unpack(view.text.levels), plan.tiers[1, 0].numpy())
    other = session.plan("snapkv", budget=0.6, window=4)
    view.plan = other
    np.testing.assert_array_equal(unpack(view.text.levels), other.tiers[1, 0].numpy())
    view.raster.selected = None
    np.testing.assert_allclose(unpack(view.text.levels), other.survival().numpy())
    view.text.selected = 7
    assert view.raster.marked == 7


def test_a_run_shows_both_answers_as_tokens(session):
    run = session.run("streaming-llm", budget=0.1, max_new_tokens=5)
    view = RunView(run)
    assert len(view.answers.left) == len(run.reference_tokens)
    assert len(view.answers.right) == len(run.tokens)
    assert "KL" in view.figures.value


def test_figures_suit_a_light_and_a_dark_notebook(session):
    content = figure(memory_figure(session.run("full", max_new_tokens=2).memory, "Memory"))[PLOTLY]
    assert content["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
    assert content["layout"]["font"]["color"] == "#808080"
    assert "weights" not in {trace["name"] for trace in content["data"]}
    assert "weights" in content["layout"]["title"]["text"]


@pytest.mark.parametrize("cls", registered(), ids=lambda cls: cls.key)
def test_every_parameter_has_a_control_that_holds_its_default(cls):
    for parameter in cls.parameters():
        made = control(parameter)
        assert made.value == ("" if parameter.kind == "text" and parameter.default is None else parameter.default)
        assert made.tooltip == parameter.help


def test_controls_build_the_method_they_show():
    seen = []
    made = MethodControls("Cache", registered("kv"), "snapkv", lambda: seen.append(1), optional=True)
    made._controls["window"].value = 7
    assert seen
    assert made.method() == wb.kv.SnapKV(window=7)
    made.choice.value = "kivi"
    assert made.method() == wb.kv.KIVI()
    made.choice.value = ""
    assert made.method() is None
    assert not made.parameters.children


@pytest.mark.parametrize("cls", registered("kv"), ids=lambda cls: cls.key)
def test_controls_that_nobody_touched_build_the_method_with_its_defaults(cls):
    made = MethodControls("Cache", (cls,), cls.key, lambda: None, optional=False)
    assert made.method() == cls()
    for preset in made.preset.options:
        if preset[1]:
            made.preset.value = preset[1]
            assert made.method() == cls(**cls.preset_values(preset[1]))
    made.close()


def test_published_values_are_chosen_by_name_in_one_change(monkeypatch):
    monkeypatch.setitem(_METHODS, Windowed.key, Windowed)
    seen = []
    made = MethodControls("Cache", registered("kv"), "windowed", lambda: seen.append(1), optional=True)
    assert "Deviates: MInference is not K-means." in made._about.value
    made.preset.value = "code"
    assert (made.method(), seen) == (Windowed(window=8, step=3), [1])
    made._controls["step"].value = 5
    assert made.preset.value == "" and made.method() == Windowed(window=8, step=5)
    made.preset.value = "ours"
    assert made.method() == Windowed()
    made.choice.value = "full"
    assert made.preset.layout.display == "none"


def test_a_thread_for_plans_runs_the_newest_job_and_skips_the_rest():
    latest, started, go, done = LatestJob(), threading.Event(), threading.Event(), []

    def slow() -> None:
        started.set()
        go.wait(10)

    latest.submit(slow)
    assert started.wait(10)
    for i in range(50):
        latest.submit(lambda i=i: done.append(i))
    go.set()
    assert latest.wait(10)
    assert done == [49]
    latest.submit(lambda: 1 / 0)
    latest.submit(lambda: done.append("alive"))
    assert latest.wait(10)
    assert done[-1] == "alive"
    latest.close()


def test_a_moved_budget_changes_the_raster_and_back_again(controls):
    before = controls.view.raster.kept
    controls.budget.value = 0.6
    assert controls._planner.wait()
    assert 0.5 < kept_share(controls.view) <= 0.6
    controls.budget.value = 0.25
    assert controls._planner.wait()
    assert controls.view.raster.kept == before


def test_a_budget_that_cannot_be_met_is_told_and_keeps_the_last_plan(controls):
    controls.first.choice.value = "mikv"
    controls.budget.value = 0.5
    assert controls._planner.wait()
    shown = controls.view.plan
    controls.budget.value = 0.02
    assert controls._planner.wait()
    assert "smallest" in controls.trouble.value
    assert controls.view.plan is shown
    controls.budget.value = 0.6
    assert controls._planner.wait()
    assert controls.trouble.value == ""


def test_scoring_anew_while_decoding_has_a_place_beside_scorer_and_store(controls):
    controls.first.choice.value, controls.second.choice.value = "keydiff", "turbomind"
    controls.decoding.choice.value = "decoding"
    controls.decoding._controls["every"].value = 8
    recipe = controls.recipe()
    assert [method.key for method in recipe.methods] == ["keydiff", "turbomind", "decoding"]
    assert recipe.methods[2].every == 8 and recipe.budget is not None
    assert "decoding" not in {key for _, key in controls.second.choice.options}  # one place for it
    assert [key for _, key in controls.decoding.choice.options] == ["", "decoding"]


def test_a_weight_method_whose_size_can_be_chosen_has_a_slider_for_it(controls):
    assert controls.weights_budget.layout.display == "none"
    controls.weights.choice.value = "bitstack"
    assert controls.weights_budget.layout.display == ""
    assert controls.weights_budget.value == 0.3
    controls.weights_budget.value = 0.45
    (method,) = controls.recipe().family("weights")
    assert method.budget.amount == 0.45
    controls.weights.choice.value = "gptq"
    assert controls.weights_budget.layout.display == "none"
    (method,) = controls.recipe().family("weights")
    assert method.budget is None


def test_a_run_from_the_panel_lands_in_the_session(controls, session):
    controls.question.value = "why"
    controls.second.choice.value = "adakv"
    controls.run()
    until(lambda: controls._progress is None)
    assert controls.status.value == ""
    (run,) = session.runs
    assert [method.key for method in run.recipe.methods] == ["snapkv", "adakv"]
    assert run.question == "why"
    assert len(controls.answer.right) == len(run.tokens)
    assert "snapkv" in controls.table.value


def test_while_a_run_is_under_way_its_answer_stands_on_its_own_side_and_is_compared_with_nothing(controls, session):
    seen = []
    controls.answer.observe(lambda _: seen.append((list(controls.answer.left), controls.answer.waiting)), names="right")
    controls.run()
    until(lambda: controls._progress is None)
    assert len(seen) >= 4
    assert all(left == [] and waiting for left, waiting in seen[1:-1]) and not seen[0][0]
    assert controls.answer.waiting == "" and controls.answer.left


def test_the_table_of_runs_tells_the_bytes_of_weights(session):
    assert "weights" in runs_html([session.run("full", max_new_tokens=2)])
    run = session.run("rtn", max_new_tokens=2)
    assert mib(run.memory.samples[-1].categories["weights"]) in runs_html([run])


def test_a_cancelled_run_leaves_nothing_behind(controls, session, monkeypatch):
    started, stream = threading.Event(), session.stream

    def slow(*args: Any, **kwargs: Any) -> Any:
        for token in stream(*args, **kwargs):
            started.set()
            time.sleep(0.05)
            yield token

    monkeypatch.setattr(session, "stream", slow)
    controls.length.value = 200
    controls.run()
    assert started.wait(60)
    controls.cancel()
    until(lambda: controls._progress is None)
    assert "Cancelled" in controls.status.value
    assert session.runs == []
    assert not controls.run_button.disabled


def test_the_panel_wants_a_prompt_first(tiny_llama):
    with pytest.raises(NotRead, match="read"):
        wb.Session((tiny_llama, None)).controls()


def test_reprs_hold_no_addresses(controls, session):
    session.read(torch.arange(30))
    for thing in (controls, controls.first, PlanView(session.plan("full"))):
        assert "0x" not in repr(thing)


@pytest.mark.parametrize("view", [Heatmap, KeptRaster, MapGrid, TokenText, AnswerDiff])
def test_every_view_has_a_picture_even_where_it_holds_nothing(view):
    assert base64.b64decode(view.jupyter()._repr_mimebundle_()[PNG]).startswith(b"\x89PNG")


def test_a_picture_of_attention_holds_the_map_that_is_shown(session):
    one, other = (AttentionView(session, 0, head)._repr_mimebundle_()[PNG] for head in (0, 1))
    assert one != other
    assert one == AttentionView(session, 0, 0)._repr_mimebundle_()[PNG], "the same picture from one run to the next"


def test_a_picture_shows_text_that_no_font_has_and_no_formula():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert png([spans([("\U0001f600 \u4f60\u597d $\\frac$ \x00 a\tb\n" * 30, "#ffffff")], "$x$ <b>")], "$y")


def test_plans_runs_and_sessions_write_pages_that_hold_everything(session, tmp_path, monkeypatch):
    monkeypatch.setattr(display, "provided", {"page": report.page}.get)
    run = session.run("snapkv", budget=0.5, question="why <b>", max_new_tokens=4)
    session.run("full", max_new_tokens=2)
    plan = session.plan("knorm", budget=0.5)
    for number, write in enumerate((session.report, plan.save_html, run.save_html)):
        page = write(tmp_path / f"{number}.html").read_text()
        assert "https://" not in page.replace("https://www.w3.org", "") and "http://" not in page.replace(
            "http://www.w3.org", ""
        )
        assert "why <b>" not in page and "<!doctype html>" in page
    assert (tmp_path / "0.html").read_text().count('<input type="range"') == 1  # the full cache has no budget to move
    with pytest.raises(InputError, match="cannot be written"):
        plan.save_html(tmp_path / "none" / "plan.html")
    monkeypatch.setattr(display, "provided", lambda name: None)
    with pytest.raises(MissingExtra, match="inference-workbench"):
        plan.save_html(tmp_path / "plan.html")
