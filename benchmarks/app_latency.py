"""From moving the budget slider to repainted views in Chromium, and the app's memory, at a 2,048-token prompt."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil

from benchmarks.record import environment, write

PORT = 5087
TOKENS = 2048
PERCENTS = (60, 25, 80, 10, 50, 35, 90, 15, 70, 45, 20, 100, 5, 55, 30, 75, 12, 65, 40, 85)
SERVER = f"import torch; torch.set_num_threads(2); from workbench_widgets import serve; serve(port={PORT})"

# Moves the slider as a person would, and waits until the raster says the new share and both views have painted again.
MOVE = """async (percent) => {
  const deep = (root, found = []) => {
    for (const one of root.querySelectorAll("*")) {
      found.push(one);
      if (one.shadowRoot) deep(one.shadowRoot, found);
    }
    return found;
  };
  const all = deep(document);
  const slider = all.find((one) => one.matches("input[type=range]"));
  const shown = (one) => one.matches(".wb-view") && one.clientWidth && one.querySelector(".wb-map, .wb-text");
  const views = all.filter(shown);
  const notes = views.map((view) => view.querySelector(".wb-note"));
  const painted = new Set();
  const began = performance.now();
  return await new Promise((resolve) => {
    const watcher = new MutationObserver((changes) => {
      for (const change of changes) painted.add(change.target);
      if (!views.every((view) => painted.has(view))) return;
      requestAnimationFrame(() => {
        watcher.disconnect();
        resolve([performance.now() - began, notes[0].textContent]);
      });
    });
    for (const view of views) watcher.observe(view, { attributes: true, attributeFilter: ["data-paint-ms"] });
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(slider, String(percent));
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    slider.dispatchEvent(new Event("change", { bubbles: true }));
    setTimeout(() => { watcher.disconnect(); resolve([null, notes[0].textContent]); }, 20000);
  });
}"""


def text() -> str:
    """A haystack that makes a prompt of about 2,048 tokens with the chat template around it."""
    from workbench.examples import needle
    from workbench.models import load

    tokenizer: Any = load("smollm2-135m").tokenizer
    return needle(TOKENS - 40, count=lambda part: len(tokenizer(part)["input_ids"])).text


def measure(page: Any, prompt: str, started: float) -> dict[str, Any]:
    began = time.perf_counter()
    page.goto(f"http://127.0.0.1:{PORT}/")
    page.wait_for_selector("text=Budget (%")
    first_paint = time.perf_counter() - began
    page.wait_for_selector("text=tokens read", timeout=180_000)
    ready = time.perf_counter() - started
    page.locator("textarea:not([aria-hidden])").first.fill(prompt)
    page.get_by_role("button", name="Read", exact=True).click()
    said = page.locator("text=/[12],[0-9]{3} tokens read/")
    said.wait_for(timeout=180_000)
    page.wait_for_timeout(3000)
    times = []
    for number, percent in enumerate((40, 20, *PERCENTS)):
        took, note = page.evaluate(MOVE, percent)
        if took is None:
            raise SystemExit(f"the views were not repainted after a move to {percent}%: {note}")
        kept = re.search(r"([0-9.]+) % kept", note)
        if kept is None or abs(float(kept[1]) - percent) > 2:
            raise SystemExit(f"the views show something else after a move to {percent}%: {note}")
        if number >= 2:  # the first moves compile and cache
            times.append(took)
        page.wait_for_timeout(600)
    return {"read": said.text_content(), "first_paint_s": first_paint, "ready_s": ready, "ms": times}


def main() -> None:
    from playwright.sync_api import sync_playwright

    before = environment()
    prompt = text()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium on the PATH: apt-get install chromium")
    started = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-c", SERVER])
    try:
        process = psutil.Process(server.pid)
        deadline = time.monotonic() + 120
        while not any(c.status == "LISTEN" for c in process.net_connections()):
            if time.monotonic() > deadline or server.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            figures = measure(page, prompt, started)
            figures["rss_mib"] = process.memory_info().rss / 2**20
            page.get_by_role("button", name="Run", exact=True).click()
            page.wait_for_selector("text=KL divergence", timeout=300_000)
            figures["rss_after_run_mib"] = process.memory_info().rss / 2**20
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
    times = figures["ms"]
    figures["median_ms"] = statistics.median(times)
    figures["p90_ms"] = statistics.quantiles(times, n=10)[8]
    table = [
        ["what", "measured", "limit"],
        [f"slider to repainted views, median of {len(times)}", f"{figures['median_ms']:.0f} ms", "300 ms"],
        ["slider to repainted views, 90th percentile", f"{figures['p90_ms']:.0f} ms", ""],
        ["process memory, prompt read", f"{figures['rss_mib']:.0f} MiB", "2,048 MiB"],
        ["process memory, after a run", f"{figures['rss_after_run_mib']:.0f} MiB", "2,048 MiB"],
        ["first paint of the first page, the model still loading", f"{figures['first_paint_s']:.1f} s", ""],
        ["from starting the app to a text that is read", f"{figures['ready_s']:.1f} s", ""],
    ]
    write("app_latency", figures, table, before)


if __name__ == "__main__":
    main()
