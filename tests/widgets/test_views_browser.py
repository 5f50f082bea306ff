"""The views in a real browser: served by Panel, and in JupyterLab's host they share the same modules."""

from __future__ import annotations

import csv
import json
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waiting import until
from tests.widgets.browser import answers, free_port, watched_page
from workbench_widgets import AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText

pn = pytest.importorskip("panel")
pytestmark = pytest.mark.browser

N = 8192
TOKENS = [f" word{i % 997}" if i % 40 else "\n" for i in range(N)]


def kept(n: int) -> np.ndarray:
    """[30 layers, 3 heads, n] tiers 0..2: a third of the positions."""
    return (np.random.default_rng(0).integers(0, 6, size=(30, 3, n)) - 3).clip(0).astype(np.uint8)


def tokens_view() -> Any:
    return TokenText.panel(TOKENS, shares=(kept(N) > 0).mean((0, 1)), groups=90)


def raster_view() -> Any:
    return KeptRaster.panel(kept(N), tiers=["dropped", "2 bit", "16 bit"], tokens=TOKENS)


def map_view() -> Any:
    values = np.tril(np.random.default_rng(0).random((256, 256)).astype(np.float32) + 1e-3)
    return Heatmap.panel(values, scale="log", row_title="query", column_title="key", label="Attention")


def grid_view() -> Any:
    maps = np.tril(np.random.default_rng(0).random((6, 4, 16, 16)).astype(np.float32))
    classes = [("sink", "local", "contextual")[i % 3] for i in range(24)]
    return MapGrid.panel(maps, classes=classes, measures={"entropy": np.arange(24.0)})


def received_view() -> Any:
    return TokenText.panel(TOKENS, values=np.geomspace(1e-3, 100, N), what="attention received", label="Received")


def diff_view() -> Any:
    return AnswerDiff.panel(
        ["The", " answer", " is", " 42"], ["The", " answer", " was", " 41", "."], left_odds=[0.9] * 4
    )


@pytest.fixture(scope="module")
def stage(chromium: Any) -> Iterator[tuple[str, list[Any], threading.Event]]:
    """The address of a server; a list, of which a page shows the last component; what is set when it is drawn."""
    shown: list[Any] = []
    drawn = threading.Event()

    def page() -> Any:
        pn.state.onload(drawn.set)
        return shown[-1]

    port = free_port()
    server = pn.serve(page, port=port, address="127.0.0.1", threaded=True, show=False)
    until(lambda: answers(port))
    yield f"http://127.0.0.1:{port}/", shown, drawn
    server.stop()


@pytest.fixture
def served(chromium: Any, stage: tuple[str, list[Any], threading.Event]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`served(make, **page options)` shows a component on a page of its own: (component, watched page)."""
    (address, shown, drawn), pages = stage, []

    def show(make: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
        shown.append(make())
        watched = watched_page(chromium, **options)
        pages.append(watched)
        drawn.clear()
        watched.page.goto(address)
        watched.page.wait_for_selector(".wb-view[data-paint-ms]", timeout=30_000)
        assert drawn.wait(30), "the page is not ready"  # what Python changes while Panel still draws it may be lost
        return shown[-1], watched

    yield show
    for watched in pages:
        watched.page.close()


INKED = """canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4)
        if (pixels[i + 3]) seen.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
    return seen.size;
}"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("make", [tokens_view, received_view, raster_view, map_view, grid_view, diff_view])
def test_each_view_paints_with_no_error_and_asks_nothing_of_the_network(served, make, dark, record_property):
    def themed() -> Any:
        view = make()
        view.dark = dark
        return view

    _, watched = served(themed, dark=dark)
    view = watched.page.locator(".wb-view")
    canvases = view.locator("canvas")
    for i in range(canvases.count()):
        assert canvases.nth(i).evaluate(INKED) > 3
    if make in (tokens_view, received_view, diff_view):
        assert view.locator("[data-i]").count() >= 9
    assert ("wb-dark" in view.get_attribute("class")) is dark
    assert view.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "something is cut off"
    record_property("paint_ms", view.get_attribute("data-paint-ms"))
    assert watched.errors == []
    assert watched.outside == []


def test_a_clicked_token_reaches_python_and_a_second_click_clears_it(served):
    component, watched = served(tokens_view)
    watched.page.locator("[data-i='7']").click()
    until(lambda: component.selected == 7)
    watched.page.wait_for_selector("[data-i='7'].wb-selected")
    watched.page.locator("[data-i='7']").click()
    until(lambda: component.selected is None)


def test_tokens_are_chosen_with_the_keyboard_alone(served):
    component, watched = served(tokens_view)
    watched.page.locator(".wb-text-pane").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        watched.page.keyboard.press(key)
    until(lambda: component.selected == 2)
    assert "position 2" in watched.page.locator(".wb-live").text_content()
    watched.page.keyboard.press("End")
    watched.page.wait_for_selector(f"[data-i='{N - 1}']")
    watched.page.keyboard.press("Enter")
    until(lambda: component.selected == N - 1)


def test_only_the_tokens_in_sight_are_in_the_page(served):
    _, watched = served(tokens_view)
    assert watched.page.locator("[data-i]").count() < 1500


def test_how_many_tokens_there_are_and_how_much_of_them_is_kept_stands_above_them(served):
    _, watched = served(tokens_view)
    share = round(100 * float((kept(N) > 0).mean()))
    assert watched.page.locator(".wb-note").first.text_content() == f"{N:,} tokens, {share} % kept"


def test_hovering_a_token_tells_its_text_position_and_share(served):
    _, watched = served(tokens_view)
    watched.page.locator("[data-i='5']").hover()
    said = watched.page.locator(".wb-tip").text_content()
    shares = (kept(N) > 0).mean((0, 1))
    assert "word5" in said
    assert "position 5" in said
    assert f"{round(shares[5] * 90)} of 90" in said


def test_a_clicked_row_of_the_raster_is_its_layer_and_head(served):
    component, watched = served(raster_view)
    canvas = watched.page.locator(".wb-map canvas")
    row = 4  # pixels: floor(420 / 90 rows)
    canvas.click(position={"x": 300, "y": 4 + (7 * 3 + 2) * row + 2})
    until(lambda: component.selected == (7, 2))
    canvas.press("ArrowDown")
    canvas.press("ArrowDown")
    canvas.press("Enter")
    until(lambda: component.selected == (8, 0))


def test_dragging_on_a_map_sets_its_window_and_escape_clears_it(served):
    component, watched = served(map_view)
    box = watched.page.locator(".wb-map canvas").bounding_box()
    mouse = watched.page.mouse
    mouse.move(box["x"] + 200, box["y"] + 100)
    mouse.down()
    mouse.move(box["x"] + 300, box["y"] + 180, steps=4)
    mouse.move(box["x"] + 420, box["y"] + 260, steps=4)
    mouse.up()
    until(lambda: component.window is not None)
    r0, r1, c0, c1 = component.window
    assert 0 < r0 < r1 < 256
    assert 0 < c0 < c1 < 256
    assert component.selected is None
    watched.page.locator(".wb-map canvas").press("Escape")
    until(lambda: component.window is None)


def canvas_of(watched: Any) -> Any:
    return watched.page.locator(".wb-view canvas")


def big_map(n: int = 4096, cells: int = 512) -> Any:
    """A map of a 4,096-token prompt, pooled as the session pools it."""
    values = np.tril(np.random.default_rng(0).random((cells, cells)).astype(np.float32) ** 8 + 1e-6)
    tokens = [f" word{i % 997}" for i in range(n)]
    return Heatmap.panel(values, at=(0, n, 0, n), scale="log", tokens=tokens, row_title="query", column_title="key")


def test_the_keyboard_zooms_in_and_steps_back_out_and_each_step_is_a_crumb(served):
    component, watched = served(big_map)
    canvas = canvas_of(watched)
    canvas.press("ArrowDown")
    canvas.press("ArrowDown")
    canvas.press("Enter")
    until(lambda: component.window is not None)
    first = component.window
    assert first[1] - first[0] == 1024
    assert first[0] <= 8 < first[1]  # around the cursor, one pooled cell down
    canvas.press("+")
    until(lambda: component.window != first)
    second = component.window
    assert second[1] - second[0] == 512
    crumbs = watched.page.locator(".wb-trail")
    crumbs.locator("b").wait_for()
    assert crumbs.locator("button").count() == 2
    canvas.press("Escape")
    until(lambda: component.window == first)
    canvas.press("-")
    until(lambda: component.window != first)
    assert component.window[1] - component.window[0] == 2048
    crumbs.get_by_role("button", name="Whole map").click()
    until(lambda: component.window is None)
    crumbs.locator("b").wait_for(state="detached")


PRESSED_TOGETHER = """(canvas, keys) => {
    for (const key of keys) canvas.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
}"""


def test_keys_that_follow_each_other_within_one_frame_all_count(served):
    component, watched = served(big_map)
    canvas = canvas_of(watched)
    canvas.evaluate(PRESSED_TOGETHER, ["+", "+", "+"])
    until(lambda: component.window is not None and component.window[1] - component.window[0] == 512)
    canvas.evaluate(PRESSED_TOGETHER, ["Escape", "Escape", "-"])
    until(lambda: component.window is None)  # from 2,048 rows of 4,096 one step out is the whole map


def test_zooming_back_out_shows_the_whole_map_at_once_and_finer_tiles_join_it(served):
    component, watched = served(big_map)
    picture = "canvas => canvas.toDataURL()"
    whole = canvas_of(watched).evaluate(picture)
    component.window = (1000, 1016, 990, 1006)
    watched.page.locator(".wb-trail b", has_text="1,000–1,015 × 990–1,005").wait_for()
    coarse = canvas_of(watched).evaluate(picture)
    fine = np.tril(np.random.default_rng(1).random((16, 16)).astype(np.float32), k=10)
    fine[3, 4] = 0.0123456
    Heatmap.update(component, fine, at=component.window)
    box = canvas_of(watched).bounding_box()
    left, right = 102, box["width"] - 8  # 62 or more for the labels
    watched.page.wait_for_timeout(300)
    assert canvas_of(watched).evaluate(picture) != coarse
    watched.page.mouse.move(box["x"] + left + (right - left) * 4.5 / 16, box["y"] + 4 + (box["height"] - 42) * 3.5 / 16)
    said = watched.page.locator(".wb-tip").all_inner_texts()[0].splitlines()
    assert said == ["0.012346", "query 1,003 “ word6”", "key 994 “ word994”"]
    component.window = None
    watched.page.locator(".wb-trail b").wait_for(state="detached")
    watched.page.mouse.move(5, 5)
    assert canvas_of(watched).evaluate(picture) == whole


def test_hovering_a_pooled_cell_tells_its_tokens_and_that_it_is_pooled(served):
    _, watched = served(big_map)
    box = canvas_of(watched).bounding_box()
    watched.page.mouse.move(box["x"] + 62 + 3, box["y"] + 4 + 300)
    said = watched.page.locator(".wb-tip").inner_text()
    assert "(pooled over 8 × 8)" in said
    assert "“ word" in said
    assert "key" in said


def test_a_map_saves_itself_as_picture_drawing_and_numbers(served, tmp_path):
    values = np.array([[0.5, np.nan], [0.25, 0.125]], np.float32)
    _, watched = served(lambda: Heatmap.panel(values, tokens=['a,"b"', "<&\n"], label="Attention of x"))
    page = watched.page

    def saved(entry: str) -> Path:
        page.get_by_role("button", name="Save").click()
        with page.expect_download() as waited:
            page.get_by_role("menuitem", name=entry).click()
        assert waited.value.suggested_filename.startswith("attention-of-x.")
        return Path(waited.value.path())

    assert saved("PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    drawing = ET.parse(saved("SVG")).getroot()
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.25", ".25", "Attention of x", 'a,"b"'} - set(texts) <= {"0.25"}
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}image"))) == 1
    with saved("CSV").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ['0 a,"b"', "1 <&\n"]
    assert [row[1:] for row in rows[1:]] == [["0.5", ""], ["0.25", "0.125"]]
    found = json.loads(saved("JSON").read_text())
    assert found["values"] == [[0.5, None], [0.25, 0.125]]
    assert found["exact"] is True
    assert found["rows"]["edges"] == [0, 1, 2]
    assert watched.errors == []


STIRRED = """async ([canvas, kind]) => {
    const box = canvas.getBoundingClientRect();
    for (let i = 0; i < 15; i++) {
        const x = box.left + 150 + (i * 7) % 300, y = box.top + 100 + (i * 5) % 200;
        const common = {clientX: x, clientY: y, bubbles: true, pointerId: 1};
        const wheel = {...common, ctrlKey: true, deltaY: -60, cancelable: true};
        if (kind === 'zoom') canvas.dispatchEvent(new WheelEvent('wheel', wheel));
        else canvas.dispatchEvent(new PointerEvent('pointermove', {...common, buttons: kind === 'hover' ? 0 : 1}));
        await new Promise(requestAnimationFrame);
    }
}"""


def test_a_map_of_4096_tokens_is_painted_again_with_other_values_and_moves(served):
    # How fast: benchmarks/map_frames.py.
    component, watched = served(lambda: Heatmap.panel(tokens=[f" word{i % 997}" for i in range(4096)], brush=True))
    canvas = canvas_of(watched)
    values = np.tril(np.random.default_rng(0).random((512, 512)).astype(np.float32) ** 8 + 1e-6)
    Heatmap.update(component, values, at=(0, 4096, 0, 4096), scale="log", label="Attention of layer 3, head 1")
    watched.page.locator(".wb-title", has_text="layer 3").wait_for()
    assert canvas.evaluate(INKED) > 100
    box = canvas.bounding_box()
    seen = [canvas.screenshot()]
    for kind in ("hover", "zoom", "brush", "pan"):
        if kind == "pan":
            watched.page.keyboard.down("Shift")
        if kind in ("brush", "pan"):
            watched.page.mouse.move(box["x"] + 200, box["y"] + 200)
            watched.page.mouse.down()
        canvas.evaluate(f"canvas => ({STIRRED})([canvas, '{kind}'])")
        seen.append(canvas.screenshot())
        watched.page.mouse.up()
        watched.page.keyboard.up("Shift")
    assert all(before != after for before, after in pairwise(seen[1:]))
    assert watched.errors == []


def test_a_small_map_chooses_its_head_by_click_and_by_keyboard_in_any_order(served):
    component, watched = served(grid_view)
    canvas = canvas_of(watched)
    box = canvas.bounding_box()
    step = (box["width"] - 46 - 2) / 4
    watched.page.mouse.move(box["x"] + 46 + 2.5 * step, box["y"] + 18 + 1.5 * (step + 4))
    assert watched.page.locator(".wb-tip").inner_text().splitlines() == ["layer 1, head 2", "sink head", "entropy 6"]
    watched.page.mouse.down()
    watched.page.mouse.up()
    until(lambda: component.selected == (1, 2))
    watched.page.locator(".wb-sort select").select_option("entropy")
    until(lambda: component.sort == "entropy")
    canvas.press("ArrowUp")  # to the selected one
    canvas.press("ArrowLeft")
    canvas.press("Enter")
    until(lambda: component.selected == (1, 3))  # entropy 7, before 6
    assert "layer 1, head 3" in watched.page.locator(".wb-live").text_content()
    assert "sink 8" in watched.page.locator(".wb-legend").text_content()
    assert watched.errors == []


def test_hovering_a_token_tells_what_it_receives(served):
    _, watched = served(received_view)
    watched.page.locator("[data-i='5']").hover()
    assert "attention received 0.00" in watched.page.locator(".wb-tip").text_content()


@pytest.mark.parametrize("dark", [False, True])
def test_a_saved_page_works_from_a_file_without_python(chromium, tmp_path, dark):
    path = tmp_path / "map.html"
    path.write_text(Heatmap.html(np.tril(np.ones((64, 64), np.float32)), label="Alone", tokens=["<b>"] * 64))
    watched = watched_page(chromium, dark=dark)
    watched.page.goto(path.as_uri())
    watched.page.wait_for_selector(".wb-view[data-paint-ms]")
    canvas = canvas_of(watched)
    canvas.press("Enter")
    watched.page.locator(".wb-trail b").wait_for()
    assert canvas.evaluate(INKED) > 3
    assert watched.page.locator(".wb-view.wb-dark").count() == int(dark)
    assert watched.errors == []
    assert watched.outside == []
    watched.page.close()


def test_a_clicked_cell_of_a_grid_is_selected(served):
    component, watched = served(lambda: Heatmap.panel(**Heatmap.grid(np.arange(12.0).reshape(4, 3), what="Error")))
    box = watched.page.locator(".wb-map canvas").bounding_box()
    watched.page.mouse.click(box["x"] + box["width"] - 40, box["y"] + 10)
    until(lambda: component.selected == (0, 2))


def test_the_first_difference_is_marked_on_both_sides(served):
    component, watched = served(diff_view)
    assert watched.page.locator(".wb-first").all_text_contents() == [" is", " was"]
    assert watched.page.locator(".wb-same").count() == 4
    watched.page.locator(".wb-first").nth(1).click()
    until(lambda: component.selected == (1, 2))


def test_data_changed_in_python_is_repainted(served):
    component, watched = served(raster_view)
    assert "33 % kept" in watched.page.locator(".wb-note").text_content()
    KeptRaster.update(component, np.zeros((30, 3, N), np.uint8))
    watched.page.locator(".wb-note", has_text="0 % kept").filter(has_not_text="33").wait_for(timeout=5000)
    KeptRaster.update(component, np.ones((30, 3, N), np.uint8))
    watched.page.locator(".wb-note", has_text="100 % kept").wait_for(timeout=5000)
    assert watched.errors == []


@pytest.mark.parametrize("width", [420, 1280, 1920])
def test_a_view_follows_the_width_of_its_container(served, width):
    _, watched = served(raster_view, width=width)
    canvas = watched.page.locator(".wb-map canvas")
    assert width * 0.8 < canvas.bounding_box()["width"] <= width
    watched.page.set_viewport_size({"width": width + 200, "height": 900})
    watched.page.wait_for_timeout(300)
    assert canvas.bounding_box()["width"] > width * 0.8 + 150
