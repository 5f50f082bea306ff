"""Make the README's pictures: `python docs/screenshots.py` starts the app and writes docs/images/*.png.

With names (`python docs/screenshots.py app-weights`) it makes only those.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

IMAGES = Path(__file__).parent / "images"
PORT = 5091
ADDRESS = f"http://127.0.0.1:{PORT}/"
SERVER = f"from workbench_widgets import serve; serve(port={PORT})"
SLOW = 240_000  # milliseconds


class Picture(NamedTuple):
    """shows: what is waited for; empty: a run is made, and its answer waited for."""

    name: str
    query: str
    size: tuple[int, int]
    dark: bool = False
    shows: str = ""


PICTURES = (
    Picture("app-light", "?budget=35%25", (1280, 1150)),
    Picture("app-dark", "?kv=adakv&budget=30%25", (1920, 1080), dark=True),
    Picture("app-weights", "?model=workbench-tiny&kv=full&weights=gptq&tab=6", (1280, 1150), shows=".tabulator-row"),
)


def open_page(page: Any, query: str, *, dark: bool) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            page.goto(ADDRESS + query)
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    page.get_by_role("button", name="Read", exact=True).wait_for(timeout=SLOW)
    load = page.get_by_role("button", name="Load", exact=True)  # what a link asks for beyond the default page
    if load.is_visible():
        load.click()
    page.wait_for_selector("text=tokens read", timeout=SLOW)
    page.wait_for_selector("text=Positions kept", timeout=SLOW)
    if dark:
        page.locator("button[aria-label*='heme']").first.click()
    page.wait_for_timeout(3000)


def take(browser: Any, picture: Picture) -> None:
    width, height = picture.size
    page = browser.new_page(viewport={"width": width, "height": height})
    open_page(page, picture.query, dark=picture.dark)
    if picture.shows:
        page.wait_for_selector(picture.shows, timeout=SLOW)
    else:
        page.get_by_role("button", name="Run", exact=True).click()
        page.wait_for_selector("text=KL divergence", timeout=SLOW)
    page.mouse.move(width / 2, 4)
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / f"{picture.name}.png")
    page.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium on the PATH: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    server = subprocess.Popen([sys.executable, "-c", SERVER])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for picture in PICTURES:
                if not sys.argv[1:] or picture.name in sys.argv[1:]:
                    take(browser, picture)
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main()
