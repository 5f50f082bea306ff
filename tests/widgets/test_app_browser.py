"""The served app in Chromium, with the default model: one server for all tests, a tab for each."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.waiting import changed, until
from tests.widgets.browser import Watched, answers, free_port, shown, watched_page
from workbench.models import cached

pn = pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")
pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
SLOW = 90_000  # milliseconds: reading and answering on a busy machine
SHORT = "Ada keeps a red kite in the attic. Ben keeps a blue drum in the shed. " * 4


@pytest.fixture(scope="module")
def address(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app's address; the server runs in this process."""
    if cached(MODEL) is None and not os.environ.get("CI"):
        pytest.skip(f"the default model is not in the cache: run `workbench models fetch {MODEL}`")
    from workbench_widgets import serve

    port = free_port()
    server = serve(port=port, model=MODEL, pages=tmp_path_factory.mktemp("pages"), threaded=True)
    until(lambda: answers(port), what="the server")
    yield f"http://127.0.0.1:{port}/"
    server.stop()


@pytest.fixture
def open_tab(chromium: Any, address: str) -> Iterator[Callable[..., Watched]]:
    """`open_tab(query)` opens a tab and waits until its text has been read and planned.

    load: the link asks for more than the default page, and a person agrees.
    """
    tabs: list[Watched] = []

    def tab(query: str = "", *, load: bool = False, **options: Any) -> Watched:
        watched = watched_page(chromium, **options)
        tabs.append(watched)
        watched.page.set_default_timeout(SLOW)
        watched.page.goto(address + query)
        if load:
            press(watched.page, "Load")
        watched.page.wait_for_selector("text=tokens read")
        shown(watched.page, figure(watched.page, "KV cache"))
        return watched

    yield tab
    for watched in tabs:
        watched.page.close()
    for watched in tabs:
        assert watched.errors == []
        assert watched.outside == []


def own(text: str, **more: str) -> str:
    return "?example=&text=" + quote(text) + "".join(f"&{name}={quote(value)}" for name, value in more.items())


def figure(page: Any, name: str) -> Any:
    """The number under a name."""
    return page.locator(f".row > div:has(.name:text-is('{name}')) .value")


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def set_budget(page: Any, budget: str) -> None:
    field = page.get_by_label("Exactly")
    field.fill(budget)
    field.press("Enter")


PICTURE = "canvas => canvas.toDataURL()"
WHOLE = "element => element.scrollWidth <= element.clientWidth + 1"  # nothing of it is cut off at the right


def raster(page: Any) -> str:
    """What the raster's canvas shows."""
    return str(page.locator("[aria-label='Kept positions by layer and head'] .wb-map canvas").first.evaluate(PICTURE))


def test_an_example_is_read_a_budget_moved_and_a_question_answered(open_tab: Callable[..., Watched]) -> None:
    page = open_tab("?example=needle").page
    assert "595 tokens read" in page.locator("text=tokens read").text_content()
    assert figure(page, "Share of bytes").text_content() == "24.9%"
    before = raster(page)
    slider = page.locator("input[type=range]").first
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    figure(page, "Share of bytes").filter(has_text=re.compile("^3[45]")).wait_for()
    assert changed(lambda: raster(page), before) != before
    page.wait_for_url(re.compile("budget=35"))  # 34% of the bytes is in view a little earlier
    assert page.get_by_label("Exactly").input_value() == "35%"

    page.get_by_label("At most (tokens)").fill("24")
    press(page, "Run")
    figure(page, "KL divergence").wait_for()
    answers = page.locator("[aria-label^='Answer'], .wb-view").all_text_contents()
    assert any("The secret code" in text for text in answers)
    assert any("7391" in text for text in answers)  # the full answer is right
    page.get_by_role("tab", name="Runs").click()
    assert "snapkv 0.35" in page.locator(".tabulator-row").first.text_content()
    page.wait_for_url(re.compile("budget=35.*tab=5"))


def test_raising_the_budget_again_restores_exactly_what_was_there(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT)).page
    at_half = changed(lambda: (set_budget(page, "50%"), raster(page))[1], raster(page))
    page.wait_for_timeout(500)
    at_half = raster(page)
    set_budget(page, "20%")
    changed(lambda: raster(page), at_half)
    set_budget(page, "50%")
    until(lambda: raster(page) == at_half)


def test_a_budget_too_small_is_one_notice_that_names_the_smallest(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT, kv="full", store="kivi", budget="50%")).page
    set_budget(page, "2%")
    notice = page.get_by_role("alert").filter(has_text="smallest")
    notice.wait_for()
    assert "kivi" in notice.text_content()
    figure(page, "KV cache").wait_for(state="detached")  # what was planned before is not of this budget
    set_budget(page, "5 parsecs")
    page.get_by_role("alert").filter(has_text="parsecs").wait_for()
    set_budget(page, "60%")
    page.get_by_role("alert").filter(has_text="parsecs").wait_for(state="detached")


def test_two_tabs_never_disturb_each_other(open_tab: Callable[..., Watched]) -> None:
    one = open_tab(own(SHORT, kv="knorm", budget="60%")).page
    other = open_tab(own("Rain fell on the harbour all day long. " * 6, kv="tova", budget="30%", tokens="4")).page
    first = figure(one, "KV cache").text_content()
    set_budget(other, "80%")
    figure(other, "Share of bytes").filter(has_text=re.compile("^(79|80)")).wait_for()
    assert figure(one, "KV cache").text_content() == first
    press(other, "Run")
    figure(other, "KL divergence").wait_for()
    assert figure(one, "KL divergence").count() == 0
    other.close()
    set_budget(one, "40%")
    figure(one, "Share of bytes").filter(has_text=re.compile("^(39|40)")).wait_for()


def test_a_run_can_be_cancelled_and_nothing_is_lost(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT)).page
    held = figure(page, "KV cache").text_content()
    page.get_by_label("At most (tokens)").fill("512")
    page.get_by_label("Question about the text").fill("Tell a very long story about all of them.")
    press(page, "Run")
    press(page, "Cancel")
    page.get_by_role("alert").filter(has_text="Cancelled").wait_for()
    assert figure(page, "KV cache").text_content() == held
    page.get_by_label("At most (tokens)").fill("4")
    page.get_by_label("At most (tokens)").press("Tab")
    page.wait_for_url(re.compile("tokens=4(&|$)"))
    press(page, "Run")
    figure(page, "KL divergence").wait_for()


def test_an_empty_text_is_one_clear_message_and_the_page_stays(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT)).page
    held = figure(page, "KV cache").text_content()
    page.locator("textarea:not([aria-hidden])").first.fill("   ")
    press(page, "Read")
    page.get_by_role("alert").filter(has_text="empty").wait_for()
    assert figure(page, "KV cache").text_content() == held


def test_a_comparison_fills_the_table_and_its_file(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT, tokens="4", tab="5", budget="50%")).page
    page.get_by_role("textbox", name="Budgets").fill("50%")
    page.get_by_role("textbox", name="Budgets").press("Enter")
    press(page, "Compare")
    page.locator(".tabulator-row").nth(3).wait_for()
    assert page.locator(".tabulator-tableholder").evaluate(WHOLE)
    page.wait_for_selector(".js-plotly-plot")
    with page.expect_download() as waited:
        page.locator("button:has-text('CSV'), a:has-text('CSV')").first.click()
    with Path(waited.value.path()).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"].split()[0] for row in rows] == ["full", "snapkv", "streaming-llm", "kivi"]
    assert float(rows[0]["kl"]) < 1e-3
    assert {"kv_nbytes", "top1", "nll_difference", "perplexity", "text"} <= rows[0].keys()


def test_a_row_of_the_raster_shows_that_head_alone_and_comes_back(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT, kv="adakv", budget="40%")).page
    canvas = page.locator("[aria-label='Kept positions by layer and head'] .wb-map canvas").first
    canvas.click(position={"x": 300, "y": 30})
    page.wait_for_selector("text=/Prompt, as layer \\d+, KV head \\d keeps it/")
    press(page, "Show all heads")
    page.wait_for_selector("text=Prompt, by the share")


def test_every_tab_shows_its_view_in_both_themes(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT)).page
    toggle = page.locator("button[aria-label*='heme']").first
    for dark in (False, True):
        if dark:
            toggle.click()
            page.wait_for_selector("[aria-label='Kept positions by layer and head'].wb-dark")
        for tab, shows in (
            ("Attention", "text=Attention of layer 0, head 0"),
            ("Head error", "text=Relative error of each head"),
            ("Outliers", ".js-plotly-plot"),
            ("Memory", ".js-plotly-plot"),
            ("Runs", "text=No runs yet"),
            ("Weights", "text=Choose a weight method"),
            ("Tokens", "text=Kept positions"),
        ):
            page.get_by_role("tab", name=tab).click()
            page.wait_for_selector(shows)
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth + 1"), f"{tab} is too wide"
    toggle.click()  # the browser remembers it


def test_a_link_brings_the_view_back_and_the_page_is_python_too(open_tab: Callable[..., Watched]) -> None:
    query = own(SHORT, kv="h2o", values='{"h2o": {"recent_share": 0.25}}', budget="45%", question="Who?", layer="3")
    page = open_tab(query + "&head=2&tab=1").page
    page.wait_for_selector("text=Attention of layer 3, head 2")
    assert page.get_by_label("Recent share").input_value() == "0.25"
    assert page.get_by_label("Question about the text").input_value() == "Who?"
    assert figure(page, "Share of bytes").text_content().startswith("4")
    page.locator("button:has-text('Python')").click()
    code = page.locator("pre").first.text_content()
    assert "recent_share" in code
    compile(code, "page", "exec")


def test_weights_move_by_the_megabyte_and_the_answer_follows(open_tab: Callable[..., Watched]) -> None:
    query = own(SHORT, model="workbench-tiny", kv="full", weights="bitstack", tab="6", tokens="4", question="Who?")
    page = open_tab(query + "&weights_budget=40%25", load=True).page
    page.wait_for_selector("text=Matrices compressed")
    page.wait_for_selector("section[aria-label^='Relative error of the outputs'] canvas")
    assert page.locator(".tabulator-tableholder").evaluate(WHOLE)
    weights = figure(page, "Model weights")
    before = weights.text_content()
    page.locator(".MuiSwitch-input").first.click()
    figure(page, "KL divergence").wait_for()
    field = page.get_by_label("As a size")
    field.fill("2MiB")
    field.press("Enter")
    assert changed(weights.text_content, before) < before
    page.get_by_text("full + bitstack 2 MiB").first.wait_for()
    page.wait_for_url(re.compile("weights_budget=2MiB"))


def choose_to_show(page: Any, name: str) -> None:
    """Choose from the Attention tab's menu; on a busy machine the plan that brings a choice may come after the map."""
    shows, wanted = page.get_by_role("combobox", name="Shows", exact=True), page.locator("li", has_text=name)
    for _ in range(60):
        shows.click()
        page.locator("li").first.wait_for()
        if wanted.count():
            wanted.click()
            return
        page.keyboard.press("Escape")
        page.wait_for_timeout(1000)
    raise AssertionError(f"{name!r} is not among what can be shown")


def test_attention_is_looked_into_head_by_head_and_cell_by_cell(open_tab: Callable[..., Watched]) -> None:
    page = open_tab(own(SHORT, tab="1", budget="40%")).page
    page.wait_for_selector("text=Attention of layer 0, head 0")
    grid = page.locator(".wb-grid canvas")
    grid.wait_for()
    grid.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):  # the first press goes to the head in view
        grid.press(key)
    page.wait_for_selector("text=Attention of layer 1, head 1")
    page.wait_for_selector("text=Attention received, layer 1, head 1")
    canvas = page.locator("section[aria-label^='Attention of layer 1'] .wb-map canvas")
    canvas.press("ArrowDown")
    canvas.press("Enter")
    page.locator(".wb-trail b").wait_for()
    page.locator(".wb-note", has_text="token by token").wait_for()
    canvas.press("ArrowDown")
    said = page.locator("section[aria-label^='Attention of layer 1'] .wb-live").text_content()
    assert re.search(r"^[\d.e-]+, query \d “.+”, key \d “.+”$", said), said
    canvas.press("Escape")
    page.locator(".wb-trail b").wait_for(state="detached")

    choose_to_show(page, "snapkv 0.4 − all keys")
    page.wait_for_selector("text=Difference in attention of layer 1, head 1, snapkv 0.4 − all keys")
    assert page.get_by_role("combobox", name="Shows", exact=True).evaluate(WHOLE)
    page.wait_for_selector(".wb-grid canvas")
    page.locator(".wb-sort select").select_option("class")
    assert page.locator(".wb-legend", has_text="contextual").count() == 1
