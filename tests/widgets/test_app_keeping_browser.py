"""Runs that lead on, and pages that are kept, in Chromium with the small model: one server for all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from tests.widgets.browser import watched_page
from tests.widgets.test_app_figures_browser import PATIENCE, TALE, address, figure, opened, own, press, rows, run

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
__all__ = ["address", "opened"]  # fixtures


def open_run(page: Any, place: int) -> Any:
    page.locator(".tabulator-row").nth(place).locator(".tabulator-cell").nth(2).click()
    return page.locator(".wb-opened-run")


def test_runs_open_are_pinned_named_restored_and_deleted(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, tab="5", tokens="3", budget="50%"))
    run(page)
    page.get_by_label("Exactly").fill("30%")
    page.get_by_label("Exactly").press("Enter")
    page.wait_for_url(re.compile("budget=30"))
    run(page)
    for place in (0, 1):
        details = open_run(page, place)
        details.get_by_text(f"Run {place + 1}:").wait_for()
        press(details, "Pin")
        details.get_by_role("button", name="Unpin", exact=True).wait_for()
    table = page.locator("table:has(th:text-is('KL divergence'))")
    table.wait_for()
    assert table.locator("tr").first.locator("th").all_text_contents()[1:] == ["1: snapkv 0.5", "2: snapkv 0.3"]
    page.locator("section[aria-label^='Share of the kept positions'] canvas").first.wait_for()
    details = open_run(page, 0)
    name = details.get_by_label("Name")
    name.fill("the good one")
    name.press("Enter")
    page.locator(".tabulator-row", has_text="the good one").wait_for()
    press(details, "Restore")
    page.wait_for_url(re.compile("budget=50"))
    assert page.get_by_label("Exactly").input_value() == "50%"
    figure(page, "Share of bytes").filter(has_text=re.compile("^(49|50)")).wait_for()
    press(details, "Delete")
    until(lambda: page.locator(".tabulator-row").count() == 1)
    assert [row["run"] for row in rows(page)] == ["2"]


def test_a_reload_loses_nothing_and_a_link_shows_a_long_text_elsewhere(
    opened: Callable[..., Any], chromium: Any
) -> None:
    page = opened("?tab=5&tokens=2")
    text = "".join(f"The {n}th boat is blue. " for n in range(130))[:3000]
    page.locator("textarea:not([aria-hidden])").first.fill(text)
    run(page, "Read and run")
    page.wait_for_url(re.compile("session="))
    until(lambda: page.evaluate("location.search").count("session=") == 1)
    page.wait_for_timeout(600)
    link = page.url
    page.reload()
    page.wait_for_selector("text=tokens read")
    assert page.locator("textarea:not([aria-hidden])").first.input_value() == text
    page.locator(".tabulator-row").wait_for()
    assert link == page.url
    fresh = chromium.new_context()
    other = fresh.new_page()
    other.set_default_timeout(PATIENCE)
    other.goto(link)
    other.locator(".tabulator-row").wait_for()
    assert other.locator("textarea:not([aria-hidden])").first.input_value() == text
    fresh.close()
    page.goto(re.sub("session=[^&]*", "session=" + "a" * 22, link))
    page.get_by_role("alert").filter(has_text="not kept here").wait_for()


def test_back_leads_to_what_was_chosen_and_not_along_the_slider(opened: Callable[..., Any]) -> None:
    page = opened(own(TALE, budget="50%"))
    entries = page.evaluate("history.length")
    slider = page.locator("input[type=range]").first
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
        page.wait_for_timeout(100)
    page.wait_for_url(re.compile("budget=53"))
    assert page.evaluate("history.length") == entries
    page.get_by_role("tab", name="Memory").click()
    page.wait_for_url(re.compile("tab=4"))
    assert page.evaluate("history.length") == entries + 1
    page.locator(".js-plotly-plot").wait_for()
    page.go_back()
    until(lambda: page.get_by_role("tab", name="Tokens").get_attribute("aria-selected") == "true")
    assert page.get_by_label("Exactly").input_value() == "53%"
    page.locator("[aria-label='Kept positions by layer and head'] canvas").first.wait_for()
    page.go_forward()
    until(lambda: page.get_by_role("tab", name="Memory").get_attribute("aria-selected") == "true")


def saved(page: Any, name: str) -> bytes:
    """What a button of the dialog gives."""
    with page.expect_download() as waited:
        page.get_by_role("button", name=re.compile(f"^{name}")).last.click()
    return Path(waited.value.path()).read_bytes()


def test_a_page_is_saved_opened_a_notebook_and_a_report(
    opened: Callable[..., Any], chromium: Any, tmp_path: Path
) -> None:
    page = opened(own(TALE, tab="5", tokens="3", budget="50%"))
    run(page)
    page.get_by_label("Ask on: each model goes on from its own answers").fill("And then?")
    run(page, "Ask")
    press(page, "Share")
    file = saved(page, "Save file")
    document = json.loads(saved(page, "Notebook"))
    press(page, "Make report")
    page.get_by_role("button", name=re.compile(r"^Report \(")).wait_for()
    (tmp_path / "report.html").write_bytes(saved(page, "Report"))

    # opened elsewhere: the runs and the controls are there
    (tmp_path / "page.json").write_bytes(file)
    other = opened()
    press(other, "Share")
    other.locator("input[type=file][accept='.json']").set_input_files(tmp_path / "page.json")
    until(lambda: other.get_by_role("button", name="Read (changed)").count() == 1)
    assert len(rows(other)) == 2
    (tmp_path / "page.json").write_bytes(b'{"format": "x"}')
    press(other, "Share")
    other.locator("input[type=file][accept='.json']").set_input_files(tmp_path / "page.json")
    other.get_by_role("alert").filter(has_text="no saved page").wait_for()

    # the notebook runs as it is, and gives what the page gave
    import nbformat

    nbformat.validate(document)
    space: dict[str, Any] = {}
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], "notebook", "exec"), space)
    texts = [record["row"]["text"] for record in json.loads(file)["records"]]
    assert [made.text for made in space["runs"].values()] == texts

    # the report stands alone
    watched = watched_page(chromium)
    watched.page.on("request", lambda request: watched.outside.append(request.url))
    watched.page.goto((tmp_path / "report.html").as_uri())
    watched.page.locator("canvas").first.wait_for()
    told = watched.page.locator("section > label > output")
    before, picture = told.text_content(), watched.page.locator("canvas").first.evaluate("c => c.toDataURL()")
    watched.page.locator("section > label > input[type=range]").press("ArrowRight")
    until(lambda: told.text_content() != before)
    until(lambda: watched.page.locator("canvas").first.evaluate("c => c.toDataURL()") != picture)
    assert watched.errors == []
    assert [url for url in watched.outside if not url.startswith(("file:", "blob:", "data:"))] == []
    watched.page.close()
