"""When a page's picture is there: a fresh Chromium for each page, and a clock that starts with the navigation.

A script put into the page asks every 25 ms whether the view is there: for views on canvases, whether there are as many
canvases as expected and each has ink; for views of SVG lines, whether all lines exist. As those views build themselves
in one go, nothing can ask before they are done. The time is taken two animation frames later, when the frame that holds
the picture has been handed over: `performance.now()`, which counts from the navigation's start.
"""

from __future__ import annotations

import mimetypes
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

WATCH = """(() => {
  const ink = (canvas) => {
    if (!canvas.width || !canvas.height) return false;
    const small = document.createElement("canvas");
    small.width = small.height = 8;
    const pen = small.getContext("2d");
    pen.drawImage(canvas, 0, 0, 8, 8);
    return pen.getImageData(0, 0, 8, 8).data.some((value, i) => i % 4 === 3 && value > 0);
  };
  const there = {
    canvas: () => { const all = document.getElementsByTagName("canvas"); return all.length >= COUNT && [...all].every(ink); },
    line: () => document.getElementsByTagName("line").length >= COUNT,
  }.KIND;
  const ask = () => {
    if (!there()) return setTimeout(ask, 25);
    requestAnimationFrame(() => requestAnimationFrame(() => { globalThis.firstPaint = performance.now(); }));
  };
  ask();
})();"""  # noqa: E501  (JavaScript)


@contextmanager
def browser(playwright: Any) -> Iterator[Any]:
    """A Chromium of its own, gone afterwards whatever its pages do."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        raise SystemExit("no Chromium on the PATH: apt-get install chromium")
    started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    try:
        yield started
    finally:
        started.close()


def stop_tabs(stopped: threading.Event) -> None:
    """End the tabs of this program's browsers: one that builds a page for minutes answers no request to close."""
    stopped.set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "--type=renderer" in child.cmdline():
                child.kill()


def first_paint(
    playwright: Any, page: Path, expects: tuple[str, int], scripts: dict[str, Path], limit: float
) -> dict[str, Any]:
    """How a page came up within `limit` seconds.

    expects: ("canvas" or "line", how many of them make the view). scripts: what is handed out in place of an address of
    the network that contains the key; anything else from the network is refused.

    Returns `paint_s`, or `failed` with the reason, and `script_bytes`, what was handed out.
    """
    found: dict[str, Any] = {"script_bytes": 0}
    with browser(playwright) as chromium:
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})

        def hand_out(route: Any) -> None:
            for name, path in scripts.items():
                if name in route.request.url:
                    found["script_bytes"] += path.stat().st_size
                    route.fulfill(body=path.read_bytes(), content_type=mimetypes.guess_type(path)[0])
                    return
            route.abort()

        tab.route(lambda address: address.startswith(("http:", "https:")), hand_out)
        tab.add_init_script(WATCH.replace("COUNT", str(expects[1])).replace("KIND", expects[0]))
        stopped = threading.Event()
        clock = threading.Timer(limit, stop_tabs, [stopped])
        clock.start()
        try:
            tab.goto(page.as_uri(), wait_until="commit", timeout=0)
            found["paint_s"] = tab.wait_for_function("globalThis.firstPaint", timeout=0).json_value() / 1000
        except Exception:  # noqa: BLE001  the tab is no more, for which Playwright has many names
            found["failed"] = f"not painted in {limit:.0f} s" if stopped.is_set() else "the tab crashed"
        finally:
            clock.cancel()
    return found
