"""A real browser for tests: the system's Chromium, driven by Playwright, that finds no host but this one.

conftest.py makes `chromium` a fixture of the whole run, for Playwright can be started only once in a process. Where
there is no Chromium the test skips and says so; with CI=true a missing browser is a failure, so that no one believes in
tests that never ran.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.waiting import until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def answers(port: int) -> bool:
    """Whether a server of this machine accepts connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _absent(reason: str) -> None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{reason} (CI=true: browser tests must run)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A Playwright browser on the system's Chromium."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        _absent(f"no Chromium on the PATH (looked for {', '.join(NAMES)}): apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed: pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"],
        )
        yield browser
        browser.close()


@pytest.fixture
def served_app(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """`served_app()` starts the app with workbench-tiny in this process and gives its address."""
    from workbench_widgets import serve

    servers: list[Any] = []

    def start() -> str:
        port = free_port()
        servers.append(serve(port=port, model="workbench-tiny", pages=tmp_path, threaded=True))
        until(lambda: answers(port), what="the server")
        return f"http://127.0.0.1:{port}/"

    yield start
    for server in servers:
        server.stop()


@dataclass
class Watched:
    """A page, and what must stay empty: errors on its console, and requests to any other host."""

    page: Any
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@cache
def _context(browser: Any, width: int, height: int, dark: bool) -> Any:
    """One for all pages of a kind: what a page has fetched and compiled, the next one finds."""
    return browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )


def watched_page(browser: Any, *, width: int = 1280, height: int = 900, dark: bool = False) -> Watched:
    """A new page whose console errors and requests to other hosts are recorded."""
    watched = Watched(_context(browser, width, height, dark).new_page())

    def note(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in ("127.0.0.1", "localhost"):
            watched.outside.append(request.url)

    watched.page.on("request", note)
    watched.page.on("websocket", note)
    watched.page.on("console", lambda said: watched.errors.append(said.text) if said.type == "error" else None)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    return watched


def shown(page: Any, part: Any) -> None:
    """Wait until a part of the app's page is there. A page whose first plan never shows, as happens now and then for a
    reason that is not known, is loaded once more, as a person would.
    """
    from playwright.sync_api import TimeoutError as TooLong

    try:
        part.wait_for(timeout=25_000)
    except TooLong:
        page.reload()
        part.wait_for()
