"""What the app says of runs, in Chromium with the small model: one server and one tab for all, each test goes on from
a page of its own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import workbench as wb
from tests.waiting import until
from tests.widgets.browser import Watched, answers, free_port, shown, watched_page

pn = pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

PATIENCE = 60_000  # milliseconds, on a busy machine
TALE = "Ada keeps a red kite in the attic. Ben keeps a blue drum in the shed. " * 4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from workbench_widgets import serve

    port = free_port()
    pages = tmp_path_factory.mktemp("pages")
    server = serve(port=port, model="workbench-tiny", pages=pages, threaded=True)
    until(lambda: answers(port), what="the server")
    yield f"http://127.0.0.1:{port}/"
    server.stop()


@pytest.fixture
def opened(chromium: Any, address: str) -> Iterator[Callable[..., Any]]:
    """`opened(query)`: a page whose text has been read and planned."""
    tabs: list[Watched] = []

    def page(query: str = "") -> Any:
        watched = watched_page(chromium)
        tabs.append(watched)
        watched.page.set_default_timeout(PATIENCE)
        watched.page.goto(address + query)
        watched.page.wait_for_selector("text=tokens read")
        shown(watched.page, figure(watched.page, "KV cache"))
        return watched.page

    yield page
    for watched in tabs:
        watched.page.close()
        assert (watched.errors, watched.outside) == ([], [])


def own(text: str, **more: str) -> str:
    return "?example=&text=" + quote(text) + "".join(f"&{name}={quote(value)}" for name, value in more.items())


def figure(page: Any, name: str) -> Any:
    """The number under a name, the first of the page."""
    return page.locator(f".row > div:has(.name:text-is('{name}')) .value").first


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).first.click()


def run(page: Any, button: str = "Run") -> None:
    """Run, and wait until the answer has been measured."""
    press(page, button)
    page.get_by_role("button", name="Cancel", exact=True).first.wait_for(state="visible")
    page.get_by_role("button", name="Cancel", exact=True).first.wait_for(state="hidden")
    figure(page, "KL divergence").wait_for()


def set_budget(page: Any, budget: str) -> None:
    field = page.get_by_label("Exactly")
    field.fill(budget)
    field.press("Enter")


def rows(page: Any) -> list[dict[str, str]]:
    """The runs as the CSV has them."""
    with page.expect_download() as waited:
        page.locator("button:has-text('CSV'):visible, a:has-text('CSV'):visible").last.click()
    with Path(waited.value.path()).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_first_answer_is_judged_and_bytes_are_those_in_memory_everywhere(opened: Callable[..., Any]) -> None:
    page = opened("?tab=5&tokens=16")
    assert page.get_by_label("Expected answer").input_value() == "19130"
    assert figure(page, "Model weights").text_content() == "32 MiB"
    assert "16 MiB at 16 bits" in page.locator(".note").filter(has_text="in memory").first.text_content()
    run(page)
    assert figure(page, "Answer").text_content() == "Right"
    assert page.locator("h4").all_text_contents()[0].startswith("Uncompressed")
    (row,) = rows(page)
    assert (row["correct"], row["full_correct"], row["expected"]) == ("True", "True", "19130")
    assert 1.99 < int(row["weight_nbytes"]) / int(row["weight_deployed_nbytes"]) <= 2.01
    assert int(row["total_nbytes"]) == int(row["kv_nbytes"]) + int(row["weight_nbytes"])
    assert int(row["peak_nbytes"]) > int(row["total_nbytes"])
    titles = page.locator(".tabulator-col-title").all_text_contents()
    assert {"Weights MiB", "Total MiB", "Peak MiB", "Right"} <= set(titles)
    assert "32.0" in page.locator(".tabulator-row").first.text_content()

    # an answer that is wrong without any compression says nothing of compression
    page.get_by_label("Expected answer").fill("seventeen")
    page.get_by_label("Expected answer").press("Tab")
    run(page)
    page.get_by_role("alert").filter(has_text="own answer is wrong").wait_for()
    assert figure(page, "Answer").text_content() == "Wrong"


def test_an_edited_text_is_read_before_it_is_asked_about(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, tokens="4"))
    field = page.locator("textarea:not([aria-hidden])").first
    field.fill("The tower is old. The river is cold. " * 6)
    page.get_by_role("button", name="Read (changed)").wait_for()
    run(page, "Read and run")
    page.get_by_role("button", name="Run", exact=True).wait_for()
    page.get_by_role("button", name="Read", exact=True).wait_for()
    assert page.locator(".wb-view").filter(has_text="tower").count()


def test_numbers_of_other_settings_are_not_shown_as_those_of_these(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, tokens="4", kv="full", store="kivi", budget="50%"))
    run(page)
    set_budget(page, "2%")
    page.get_by_role("alert").filter(has_text="smallest").wait_for()
    assert page.locator(".name:text-is('KV cache')").count() == 0
    page.get_by_role("alert").filter(has_text="This answer was made with kivi").wait_for()
    set_budget(page, "80%")
    figure(page, "KV cache").wait_for()
    page.get_by_role("alert").filter(has_text="This answer was made with").wait_for()
    run(page, "Run again")
    page.get_by_role("alert").filter(has_text="This answer was made with").wait_for(state="hidden")


def test_two_models_go_on_from_their_own_answers_and_follow_ups_stay_off_the_front(opened: Callable[..., Any]) -> None:
    page = opened("?tab=5&tokens=16")
    run(page)
    page.get_by_label("Ask on: each model goes on from its own answers").fill("Where is it?")
    run(page, "Ask")
    chat = page.locator("table:has(th:text-is('Uncompressed'))")
    assert chat.locator("td[colspan]").all_text_contents() == [
        "What is the secret number of the watermill?",
        "Where is it?",
    ]
    page.get_by_text("↳").first.wait_for()
    table = rows(page)
    assert [row["turn"] for row in table] == ["1", "2"]
    assert page.locator(".js-plotly-plot:visible").count() == 0  # what goes on from another run has no front
    page.get_by_role("combobox", name="Runs of").click()
    page.locator("li", has_text="watermill? ·").first.click()
    page.locator(".js-plotly-plot").wait_for()
    points = "plot => plot.data.flatMap(t => t.name === 'front' ? [] : [...t.x]).length"
    until(lambda: page.locator(".js-plotly-plot").evaluate(points) == 1)


def test_runs_on_other_texts_and_questions_are_never_on_one_front(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, tab="5", tokens="2"))
    run(page)
    page.get_by_label("Question about the text").fill("Who keeps a drum?")
    page.get_by_label("Question about the text").press("Tab")
    run(page)
    groups = page.get_by_role("combobox", name="Runs of")
    assert "Who keeps a drum?" in groups.text_content()
    assert page.locator(".tabulator-row").count() == 1
    groups.click()
    assert page.locator("li").count() == 3
    page.locator("li", has_text="all (2)").click()
    until(lambda: page.locator(".tabulator-row").count() == 2)
    page.get_by_text("Choose one text and question").wait_for()
    assert page.locator(".js-plotly-plot:visible").count() == 0
    assert {row["question"] for row in rows(page)} == {"", "Who keeps a drum?"}
    assert all(row["prompt_hash"] and row["model"] == "workbench-tiny" for row in rows(page))


def test_a_recipe_that_saves_weights_is_compared_and_stands_where_it_saves(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, tab="5", tokens="2", kv="full"))
    for name in ("Full cache", "SnapKV", "StreamingLLM"):
        page.locator(".MuiChip-root", has_text=name).locator("svg").click()
    page.locator(".MuiFormControl-root:has(.MuiChip-root:has-text('As they are')) .MuiSelect-select").click()
    page.locator("li", has_text=wb.weights.RTN.title).first.click()
    page.mouse.click(4, 500)
    page.get_by_role("textbox", name="Budgets").fill("50%")
    page.get_by_role("textbox", name="Budgets").press("Enter")
    press(page, "Add the recipe above")
    page.get_by_text("3 runs").wait_for()
    press(page, "Compare")
    page.locator(".tabulator-row").nth(2).wait_for()
    table = rows(page)
    assert {row["recipe"].split()[0] for row in table} == {"kivi", "full"}
    small = next(row for row in table if row["weights"])
    assert int(small["weight_nbytes"]) < int(table[0]["weight_nbytes"])
    plot = page.locator(".js-plotly-plot")
    plot.wait_for()
    rings = "(plot, n) => plot.data.flatMap(t => [...(t.customdata ?? [])].map((r, i) => [r, t.marker.line.width[i]]))"
    for axis in ("Total on the device", "KV cache", "Weights"):
        page.get_by_role("combobox", name="Against").click()
        page.locator("li", has_text=axis).first.click()
        until(lambda: [int(small["run"]), 2] in plot.evaluate(rings, 0))


def test_a_file_is_a_text_and_what_is_no_text_is_said(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = opened(own(TALE))
    (tmp_path / "story.txt").write_text("Häuser am See. " * 600, encoding="utf-8")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\xff\xfe\x00")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "story.txt")
    page.locator("p").filter(has_text="9,000 characters").wait_for()
    page.get_by_role("button", name="Read (changed)").wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "picture.txt")
    page.get_by_role("alert").filter(has_text="picture.txt is no text").wait_for()
