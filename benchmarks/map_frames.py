"""Our map of 4,096 tokens in a browser: how soon other values are on screen, and how many frames a second it moves at.

    python -m benchmarks.map_frames

A page as `Heatmap.html` writes it, of 512 x 512 random cells; no model and no server. `benchmarks.attention_view`
measures the same on what a model read, beside other viewers.
"""

from __future__ import annotations

import base64
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.first_paint import browser
from benchmarks.record import environment, write

TOKENS, PIXELS = 4096, 512

# One event a frame, as a mouse sends them, for `count` frames: the milliseconds between frames.
FRAMES = """async ([kind, count]) => {
  const canvas = document.querySelector(".wb-map canvas");
  const box = canvas.getBoundingClientRect();
  const times = [];
  for (let i = 0; i <= count; i++) {
    const at = { clientX: box.left + 150 + (i * 7) % 600, clientY: box.top + 60 + (i * 5) % 400, bubbles: true, pointerId: 1 };
    if (kind === "zoom") canvas.dispatchEvent(new WheelEvent("wheel", { ...at, ctrlKey: true, deltaY: i % 40 < 20 ? -60 : 60, cancelable: true }));
    else canvas.dispatchEvent(new PointerEvent("pointermove", { ...at, buttons: kind === "hover" ? 0 : 1 }));
    await new Promise(requestAnimationFrame);
    times.push(performance.now());
  }
  return times.slice(1).map((time, i) => time - times[i]);
}"""  # noqa: E501  (JavaScript)

# Puts fields into the view as a host does, and waits for the frame that shows them.
SHOW = """async ([plain, packed]) => {
  const view = document.querySelector(".wb-view");
  const painted = new Promise((resolve) => {
    const watcher = new MutationObserver(() => {
      watcher.disconnect();
      requestAnimationFrame(() => resolve(Number(view.dataset.paintMs)));
    });
    watcher.observe(view, { attributes: true, attributeFilter: ["data-paint-ms"] });
  });
  for (const [name, value] of Object.entries(plain)) model.set(name, value);
  for (const [name, text] of Object.entries(packed)) {
    model.set(name, new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer));
  }
  return await painted;
}"""
MOUNTED = "view.render({ model,"  # where a standalone page makes its model, and measuring reaches for it


def frame_rates(tab: Any, tokens: int) -> dict[str, dict[str, float]]:
    """Frames a second while the mouse hovers, zooms with the wheel, marks a part and moves a map of so many tokens."""
    found = {}
    box = tab.locator(".wb-map canvas").bounding_box()
    part = [tokens // 4, tokens // 4 * 3, 0, tokens // 2]  # there is room to move in every direction but left
    for kind in ("hover", "zoom", "mark", "move"):
        if kind in ("mark", "move"):
            if kind == "move":
                tab.evaluate("part => model.set('window', part)", part)
                tab.wait_for_timeout(200)
                tab.keyboard.down("Shift")
            tab.mouse.move(box["x"] + 400, box["y"] + 200)
            tab.mouse.down()
        gaps = tab.evaluate(FRAMES, [kind, 120])
        if kind in ("mark", "move"):
            tab.keyboard.up("Shift")
            tab.keyboard.press("Escape")
            tab.mouse.up()
        tab.evaluate("model.set('window', null)")
        tab.wait_for_timeout(400)
        found[kind] = {
            "frames_a_second": 1000 * len(gaps) / sum(gaps),
            "slowest_1_in_20_ms": statistics.quantiles(gaps, n=20)[-1],
        }
    return found


def rates_table(frames: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """What `frame_rates` found as rows of a table: what moves, how fast, and the least that is wanted."""
    words = {"hover": "hovering", "zoom": "zooming with the wheel", "mark": "dragging over a part", "move": "moving"}
    return [
        [
            words[kind],
            f"{rate['frames_a_second']:.0f} frames a second (slowest 1 in 20: {rate['slowest_1_in_20_ms']:.0f} ms)",
            "20",
        ]
        for kind, rate in frames.items()
    ]


def packed(fields: Mapping[str, Any]) -> dict[str, str]:
    """The arrays among a view's fields, as `SHOW` takes them."""
    return {name: base64.b64encode(value).decode() for name, value in fields.items() if isinstance(value, bytes)}


def map_of(seed: int) -> dict[str, Any]:
    """What a view of random values is given."""
    values = np.tril(np.random.default_rng(seed).random((PIXELS, PIXELS)).astype(np.float32) ** 8 + 1e-6)
    tokens = [f" word{i % 997}" for i in range(TOKENS)]
    return {"values": values, "tokens": tokens, "at": (0, TOKENS, 0, TOKENS), "scale": "log"}


def painted(tab: Any, repeats: int = 9) -> dict[str, float]:
    """Seconds from other values to the frame that shows them, and what of it was painting: medians of `repeats`."""
    from workbench_widgets import Heatmap

    seconds, milliseconds = [], []
    for seed in range(1, repeats + 1):
        given = map_of(seed)
        began = perf_counter()
        fields = Heatmap.field_values((given.pop("values"),), given)  # as Heatmap.update does, without a page
        milliseconds.append(tab.evaluate(SHOW, [{"label": f"Map {seed}"}, packed(fields)]))
        seconds.append(perf_counter() - began)
    return {"seconds": statistics.median(seconds), "paint_ms": statistics.median(milliseconds)}


def measured(folder: Path, chromium: Any) -> dict[str, Any]:
    """The figures of one page."""
    from workbench_widgets import Heatmap

    given = map_of(0)
    html = Heatmap.html(given.pop("values"), brush=True, **given)
    assert html.count(MOUNTED) == 1, "the standalone page mounts its view in another way now"
    path = folder / "map.html"
    path.write_text(html.replace(MOUNTED, f"globalThis.model = model; {MOUNTED}"), encoding="utf-8")
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(path.as_uri())
    tab.locator(".wb-view[data-paint-ms]").wait_for()
    tab.wait_for_timeout(500)
    return {"shown": painted(tab), "frames": frame_rates(tab, TOKENS)}


def table(found: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """The figures beside the limits that we hold ourselves to."""
    shown = found["shown"]
    return [
        [f"our map of one head, {TOKENS:,} tokens", "measured", "limit"],
        ["other values on screen", f"{shown['seconds']:.2f} s (painting {shown['paint_ms']:.0f} ms)", "1 s (500 ms)"],
        *rates_table(found["frames"]),
    ]


def main() -> None:
    from playwright.sync_api import sync_playwright

    before = environment()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright, browser(playwright) as chromium:
        before["chromium"] = chromium.version
        found = measured(Path(folder), chromium)
    write("map_frames", found, table(found), before)


if __name__ == "__main__":
    main()
