"""The pages beside the session in Chromium: Choose, Results and Cost, on one server with workbench-tiny."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.waiting import until
from tests.widgets.browser import Watched, answers, free_port, watched_page
from workbench.results import Results, key_of

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
SLOW = 60_000
MIB = 2**20


def stored(recipe: Any, case: int, **figures: Any) -> dict[str, Any]:
    made = wb.Recipe.of(recipe)
    row = {
        "key": key_of({"recipe": made.to_dict(), "case": case}), "status": "done", "model": "workbench-tiny",
        "model_fingerprint": "a", "recipe": made.label, "recipe_json": json.dumps(made.to_dict()), "task": "needle",
        "task_json": "{}", "case_number": case, "prompt_hash": str(case), "weight_nbytes": 16 * MIB,
        "started": datetime.now(UTC).replace(tzinfo=None),
    }  # fmt: skip
    return row | figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of three recipes."""
    path = tmp_path_factory.mktemp("results")
    sizes = {"full": (8, 0.0), "snapkv": (4, 0.1), "kivi": (2, 0.4)}
    rows = [
        stored(recipe, case, kv_nbytes=mib * MIB, total_nbytes=(16 + mib) * MIB, kl=kl + case / 100,
               correct=recipe != "kivi", full_correct=True, text=f"{recipe} says {case}")
        for recipe, (mib, kl) in sizes.items() for case in range(2)
    ]  # fmt: skip
    Results(path).add(rows)
    return path


@pytest.fixture(scope="module")
def address(chromium: Any, folder: Path) -> Iterator[str]:
    from workbench_widgets import serve

    port = free_port()
    server = serve(port=port, model="workbench-tiny", threaded=True, results=folder)
    until(lambda: answers(port), what="the server")
    yield f"http://127.0.0.1:{port}/"
    server.stop()


@pytest.fixture
def open_page(chromium: Any, address: str) -> Iterator[Callable[[str], Any]]:
    tabs: list[Watched] = []

    def tab(name: str) -> Any:
        watched = watched_page(chromium)
        tabs.append(watched)
        watched.page.set_default_timeout(SLOW)
        watched.page.goto(f"{address}?page={name}")
        watched.page.locator(f"nav a[aria-current]:text-is('{name.capitalize()}')").wait_for()
        return watched.page

    yield tab
    for watched in tabs:
        watched.page.close()
    for watched in tabs:
        assert watched.errors == [] and watched.outside == []


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def write(page: Any, label: str, text: str) -> None:
    field = page.get_by_label(label, exact=True)
    field.click()
    field.press("Control+a")
    field.press_sequentially(text) if text else field.press("Delete")
    field.press("Tab")


def tick(page: Any, *rows: int) -> None:
    """Tick rows of the table, and give the table time to say so."""
    boxes = page.locator(".tabulator-row input[type=checkbox]")
    for row in rows:
        boxes.nth(row).check()
    page.wait_for_timeout(500)


def test_an_estimate_shows_its_formulas_and_what_was_measured_beside_it(open_page: Callable[[str], Any]) -> None:
    page = open_page("cost")
    page.locator(".value:text-is('1,024.00 MiB')").wait_for()  # 8,192 tokens of Llama 3.1 8B
    page.locator("pre:has-text('32 layers, GQA: 2,048 numbers x 8,192 tokens')").wait_for()
    page.locator("text=No step of just this").wait_for()
    write(page, "Context, tokens", "131072")
    press(page, "Estimate")
    page.locator("div:text('Measured 12.3')").last.wait_for()  # kernels/bench/results/end_to_end.json
    for view in ("Gantt", "Queue", "KV occupancy", "Cost against latency"):
        press(page, view)
    page.locator(".gtitle:has-text('A million tokens')").wait_for()
    write(page, "Context, tokens", "9000000")
    press(page, "Estimate")
    page.locator(".wb-problem:has-text('131,072 positions')").wait_for()


def test_results_are_filtered_compared_pinned_noted_and_deleted(open_page: Callable[[str], Any], folder: Path) -> None:
    page = open_page("results")
    page.locator("text=6 of 6 rows").wait_for()
    page.locator(".gtitle:has-text('KL divergence against total')").wait_for()
    write(page, "Recipe contains", "kivi")
    page.locator("text=2 of 6 rows").wait_for()
    press(page, "Pin")
    page.locator(".wb-problem:has-text('Tick rows first')").wait_for()
    tick(page, 0)
    press(page, "Pin")
    page.locator(".tabulator-cell:has-text('●')").wait_for()
    tick(page, 0)
    write(page, "Note on what is chosen", "too coarse")
    press(page, "Write")
    until(lambda: any(row["note"] == "too coarse" and row["pinned"] for row in Results(folder).rows()), what="the note")
    write(page, "Recipe contains", "")
    page.locator("text=6 of 6 rows").wait_for()
    tick(page, 0, 3)
    press(page, "Compare")
    page.locator("td:has-text('kivi says')").wait_for()
    assert page.locator("td a:text-is('Open as session')").count() == 2
    press(page, "Delete")
    page.locator("text=Press Delete once more to delete 2 rows").wait_for()
    press(page, "Delete")
    page.locator("text=4 of 4 rows").wait_for()
    page.locator("text=One row a recipe").click()
    page.locator("text=3 of 4 rows").wait_for()


def test_a_search_is_watched_stopped_and_opened_as_a_session(open_page: Callable[[str], Any]) -> None:
    page = open_page("choose")
    press(page, "Search")
    page.locator(".wb-problem:has-text('Give a limit of memory')").wait_for()
    write(page, "Limit", "a lot")
    press(page, "Search")
    page.locator(".wb-problem:has-text('a lot')").wait_for()
    write(page, "Limit", "20 MiB")
    press(page, "Search")
    page.locator("text=answers right (uncompressed").wait_for()
    page.locator(".tabulator-cell:has-text('keeps all right answers')").first.wait_for()
    press(page, "Cancel")
    page.locator("text=it was stopped").wait_for()
    page.get_by_role("link", name="Open as session").first.click()
    page.locator("nav a[aria-current]:text-is('Session')").wait_for()
    assert "weights=" in page.url or "kv=" in page.url
