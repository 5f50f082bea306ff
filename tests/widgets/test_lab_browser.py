"""A notebook in a real JupyterLab in Chromium: views paint, a moved slider changes them, the console stays clean."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.waiting import until
from tests.widgets.browser import Watched, free_port, watched_page
from workbench_widgets.saving import VIEW

pytest.importorskip("jupyterlab")
pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

CELLS = (
    (
        "import torch, workbench as wb\n"
        "from workbench.models import tiny\n"
        "s = wb.Session((tiny('llama'), None))\n"
        "s.read(torch.randint(0, 200, (300,), generator=torch.Generator().manual_seed(0)))\n"
        "s"
    ),
    "s.plan('snapkv', budget=0.25)",
    "s.run('streaming-llm', budget=0.2, max_new_tokens=8).show()",
    "from workbench_widgets import AttentionView\nAttentionView(s, 1, 2)",
    "s.controls(max_new_tokens=6)",
)
CONFIG = """
from jupyterlab.galata import configure_jupyter_server
configure_jupyter_server(c)
c.ServerApp.allow_root = True
c.ServerApp.root_dir = {root!r}
c.ServerApp.jpserver_extensions = {{"workbench_widgets.saving": True}}
"""
INKED = """canvas => {
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) seen.add(pixels.slice(i, i + 3).join());
    return seen.size;
}"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook lies."""
    return tmp_path_factory.mktemp("lab") / "views.ipynb"


@pytest.fixture(scope="module")
def lab(saved: Path) -> Iterator[str]:
    """The address of a JupyterLab whose folder holds one notebook."""
    root = saved.parent
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), saved)
    config = root / "config.py"
    config.write_text(CONFIG.format(root=str(root)), encoding="utf-8")
    port = free_port()
    own = {f"JUPYTER_{name}_DIR": str(root / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "jupyterlab", "--config", str(config), "--port", str(port), "--no-browser"]
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **own}, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: there(address, server, root / "lab.log"), 90, "JupyterLab")
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def there(address: str, server: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether a JupyterLab that was started answers."""
    assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-2000:]}"
    try:
        urllib.request.urlopen(f"{address}/api", timeout=2).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


@pytest.fixture(scope="module")
def opened(lab: str, chromium: Any) -> Iterator[Watched]:
    """The notebook, with every cell run."""
    watched = watched_page(chromium, height=2600)
    page = watched.page
    page.set_default_timeout(150_000)  # a machine that does much else
    page.goto(f"{lab}/lab/tree/views.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("window.jupyterapp")
    page.wait_for_selector("text=/Python 3.*Idle/")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(".widget-hslider")
    page.wait_for_function("document.querySelectorAll('.wb-view[data-paint-ms]').length >= 9")
    yield watched
    page.close()


def test_every_view_paints(opened):
    page = opened.page
    assert (
        page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-RenderedText[data-mime-type*=stderr]").count()
        == 0
    )
    views = page.locator(".wb-view")
    assert views.count() >= 9  # the plan's two, the run's one, three of attention, the panel's three
    rasters = page.locator(".wb-map canvas")
    assert rasters.count() == 3
    for i in range(3):
        assert rasters.nth(i).evaluate(INKED) > 3
    assert page.locator(".js-plotly-plot, .jp-RenderedPlotly svg").count() >= 1


def slide(slider, percent):
    """Move a slider in percent by the keyboard; presses that a busy machine lost are made up for."""
    readout, handle = slider.locator(".widget-readout"), slider.locator(".noUi-handle")
    for _ in range(5):
        away = percent - int(readout.text_content().rstrip("%"))
        if not away:
            break
        for _ in range(abs(away)):
            handle.press("ArrowRight" if away > 0 else "ArrowLeft")
        slider.page.wait_for_timeout(200)
    assert readout.text_content() == f"{percent}%"


def test_a_moved_slider_changes_the_raster_and_moves_never_queue(opened):
    page = opened.page
    canvas = page.locator(".wb-map canvas").last
    picture = "canvas => canvas.toDataURL()"
    before = canvas.evaluate(picture)
    budget = page.locator(".widget-hslider:visible").last  # that of weights is there too, unseen
    slide(budget, 65)
    page.wait_for_function(
        "([before]) => [...document.querySelectorAll('.wb-map canvas')].at(-1).toDataURL() !== before", arg=[before]
    )
    shares = re.compile(r"(5[5-9]|6[0-5]) % kept")
    note = page.locator(".wb-note", has_text="layers").last
    until(lambda: shares.search(note.text_content()), what=shares.pattern)
    slide(budget, 25)
    page.wait_for_function(
        "([before]) => [...document.querySelectorAll('.wb-map canvas')].at(-1).toDataURL() === before", arg=[before]
    )


def test_a_run_from_the_panel_shows_its_answer_and_its_row(opened):
    page = opened.page
    page.locator("button", has_text="Run").last.click()
    page.wait_for_selector("td:has-text('snapkv 0.')")
    assert page.locator(".wb-answer span").count() >= 12


def test_a_head_chosen_among_the_small_maps_is_shown_and_zoomed_into(opened):
    page = opened.page
    grid = page.locator(".wb-grid canvas")
    for key in ("ArrowLeft", "ArrowUp", "ArrowLeft", "Enter"):  # the first press goes to the head in view
        grid.press(key)
    page.wait_for_selector("text=Attention of layer 0, head 1")
    page.wait_for_selector("text=Attention received, layer 0, head 1")
    canvas = page.locator("section[aria-label^='Attention of'] .wb-map canvas")
    for key in ("ArrowDown", "Enter", "+"):
        canvas.press(key)
    page.locator(".wb-trail b").wait_for()
    page.locator(".wb-note", has_text="token by token").wait_for()
    assert page.locator("section[aria-label^='Attention of']").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
    canvas.press("Escape")
    canvas.press("Escape")
    page.locator(".wb-trail b").wait_for(state="detached")


def test_the_console_stays_clean_and_nothing_is_asked_of_the_network(opened):
    assert opened.errors == []
    assert opened.outside == []


def test_a_saved_notebook_shows_pictures_when_it_is_opened_again_without_its_kernel(opened, lab, chromium, saved):
    page = opened.page
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    until(lambda: "image/png" in saved.read_text(encoding="utf-8"), what="the notebook on disk")
    text = saved.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 500_000 and VIEW not in text and "widgets" not in notebook.metadata
    copy = saved.with_name("copy.ipynb")  # nobody trusts it, and no kernel runs
    copy.write_text(text, encoding="utf-8")
    again = watched_page(chromium, height=2600)
    again.page.goto(f"{lab}/lab/tree/copy.ipynb?reset")
    again.page.wait_for_selector(".jp-RenderedImage img")
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert pictures >= 5
    shown = again.page.locator(".jp-RenderedImage img, .jp-RenderedHTML, .js-plotly-plot")
    until(lambda: shown.count() >= 4, what="the pictures")  # cells out of sight are not drawn
    assert "model not found" not in again.page.content()
    again.page.close()
