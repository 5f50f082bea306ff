"""What a page remembers of its runs, without a browser: figures of one kind everywhere, files, restored recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.waiting import until
from tests.widgets.workspaces import Ready, now
from workbench.errors import InputError
from workbench.measure.memory import Timeline
from workbench.recipe import Recipe
from workbench_widgets import figures

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")

from workbench_widgets.app.panels.memory import MemoryPanel
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.state.recipe_slots import RECIPE_SLOTS, parts_of
from workbench_widgets.app.work.eta import Remaining, in_words
from workbench_widgets.app.work.notebook import notebook
from workbench_widgets.app.work.records import Asked, Record
from workbench_widgets.app.work.saved_page import KeptPages, SavedPage
from workbench_widgets.app.work.workspace import Workspace

TEXT = "the needle lies under the stone " * 6


@pytest.fixture(scope="module")
def done(tiny_llama: Any, byte_tokenizer: Any) -> Any:
    """A workspace with a run of each of two recipes, and one that goes on from the last."""
    made = Workspace(now, Ready(tiny_llama, byte_tokenizer))
    made.read("tiny", TEXT)
    until(lambda: made.reading is not None)
    page = PageState(example="", text=TEXT, budget="50%")
    made.compare(
        [Recipe.of("snapkv", budget=0.5), Recipe.of(["full", wb.weights.RTN()])], Asked("where?", 3, "stone", page)
    )
    until(lambda: len(made.records) == 2 and not made.working)
    made.generate(Recipe.of("snapkv", budget=0.5), Asked("where?", 3, "stone", page))
    until(lambda: len(made.records) == 3 and not made.working)
    made.ask_on(Asked("and then?", 2))
    until(lambda: len(made.records) == 4 and not made.working)
    yield made
    made.close()


def test_bytes_of_weights_are_one_number_in_tile_table_and_timeline(done: Any) -> None:
    session = done.reading.session
    for record in done.records:
        live = record.row["weight_nbytes"]
        assert record.run.memory.samples[-1].categories["weights"] == live
        assert live == session.readings.variants.nbytes(record.run.recipe.family("weights"))
        assert record.row["total_nbytes"] == record.row["kv_nbytes"] + live <= record.row["peak_nbytes"]
    plain = session.readings.variants.nbytes(())
    assert session.memory.samples[0].categories["weights"] == plain
    assert done.records[1].row["weight_nbytes"] < plain


def test_each_model_goes_on_from_its_own_answer(done: Any) -> None:
    (turn,) = done.turns
    first = done.records[2]
    session = done.reading.session
    own = session.run("full", question="where?", max_new_tokens=3)
    assert turn.full.tokens == own.ask("and then?", max_new_tokens=2).tokens
    assert turn.record.row["after"] == first.number and turn.record.row["turn"] == 2
    assert turn.record.row["full_text"] == turn.full.text
    assert turn.record.group != first.group  # what it was asked after is a part of what it was asked
    assert first.page.budget == "50%"


def test_a_saved_page_comes_back_and_what_is_none_is_one_line(done: Any, tmp_path: Path) -> None:
    saved = SavedPage(PageState(example="", text=TEXT * 100, budget="50%"), done.records)
    text = saved.to_text()
    again = SavedPage.from_text(text)
    assert again.page == saved.page
    assert [r.row for r in again.records] == [dict(r.row) for r in json_like(done.records)]
    assert [r.page for r in again.records] == [r.page for r in done.records]
    assert text.count(f'"{TEXT}"') == text.count(f'"{TEXT * 100}"') == 1  # each text once
    data = json.loads(text)
    for change in (
        {"format": "x"},
        {"version": 99},
        {"records": [{}]},
        {"page": {"budget": "5 parsecs"}},
        {"page": {"tab": [1]}},
        {"records": [{**data["records"][0], "row": {**data["records"][0]["row"], "kl": "<b>"}}]},
        {"records": 5},
    ):
        with pytest.raises(InputError) as raised:
            SavedPage.from_text(json.dumps({**data, **change}))
        assert "\n" not in str(raised.value)
    for broken in ("", "[]", "{", "[" * 10_000):
        with pytest.raises(InputError, match="page"):
            SavedPage.from_text(broken)

    kept = KeptPages(tmp_path / "pages")
    name = kept.new_name()
    assert kept.keep(name, saved) and kept.find(name).page == saved.page
    assert (tmp_path / "pages").stat().st_mode & 0o077 == 0
    for other in (kept.new_name(), "../../etc/passwd", "", "a" * 22):
        assert kept.find(other) is None
    (tmp_path / "file").write_text("")
    assert not KeptPages(tmp_path / "file").keep(name, saved)  # where nothing can be written nothing is kept


def test_a_notebook_leaves_out_what_went_on_from_a_deleted_run(done: Any) -> None:
    whole, less = notebook(done.records, "tiny", ""), notebook([*done.records[:2], done.records[3]], "tiny", "")
    assert "runs[4] = runs[3].ask" in whole and "runs[4]" not in less and "runs[2]" in less


def json_like(records: tuple[Record, ...]) -> list[Record]:
    """Records as JSON has them."""
    return [Record({k: json.loads(json.dumps(v)) for k, v in r.row.items()}, r.page, r.answers) for r in records]


def test_a_recipe_becomes_the_controls_that_make_it() -> None:
    recipe = Recipe.of([wb.method("snapkv", window=16), wb.method("adakv"), wb.method("rtn")], budget=0.25)
    assert parts_of(recipe) == {
        **dict.fromkeys((*RECIPE_SLOTS, "weights_budget"), ""),
        "kv": "snapkv",
        "allocate": "adakv",
        "weights": "rtn",
        "budget": "25%",
        "values": {"snapkv": {"window": 16}},
    }
    assert parts_of(Recipe.of("snapkv", budget="2 MiB"))["budget"] == "2 MiB"


def test_a_run_that_is_better_in_some_memory_is_beaten_by_none_that_is_not() -> None:
    kv, kl, total = [10, 10, 5, 10], [0.0, 0.2, 0.1, 0.3], [100, 60, 95, 100]
    assert figures.unbeaten([kv, kl]) == [0, 2]
    assert figures.unbeaten([kv, kl, total]) == [0, 1, 2]


def test_memory_is_shown_by_layer_with_what_was_planned_and_opens_in_perfetto(done: Any) -> None:
    panel = MemoryPanel(done)
    panel.show(True)
    panel.parts.value = "layer"
    names = [trace.name for trace in panel.figure.object.data]
    assert names[: done.reading.session.facts.layers] == [
        f"layer {i}" for i in range(done.reading.session.facts.layers)
    ]
    assert any(shape.type == "line" for shape in panel.figure.object.layout.shapes)
    timeline = Timeline.from_dict(done.run.memory.to_dict())
    events = timeline.to_trace_events()["traceEvents"]
    counted = [event for event in events if event["name"] == "live bytes"]
    assert [sum(event["args"].values()) for event in counted] == [sample.total for sample in timeline.samples]
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)


def test_time_left_follows_the_pace_and_is_said_only_when_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("workbench_widgets.app.work.eta.time.monotonic", lambda: next(clock))
    remaining = Remaining("", 0.0, 0.0)
    said = [remaining.seconds("layers", share) for share in (0.0, 0.1, 0.25, 0.5)]
    assert said[:2] == [None, None] and said[2:] == [pytest.approx(30), pytest.approx(20)]
    assert remaining.seconds("other", 0.9) is None
    assert (in_words(None), in_words(30), in_words(170)) == ("", "about 30 s left", "about 3 min left")
