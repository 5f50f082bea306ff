"""The app as a server: who is let in, what a request may set going, what a visit leaves behind, and its end."""

from __future__ import annotations

import gc
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from tests.waiting import until
from tests.widgets.browser import answers, free_port, watched_page
from workbench.errors import BadParameter, ModelNotOffered
from workbench.progress import Progress

pytest.importorskip("panel")
pytest.importorskip("panel_material_ui")
pytest.importorskip("httpx")
pytest.importorskip("websocket")

import httpx
import panel as pn
import websocket

from workbench_widgets import serve
from workbench_widgets.app.page import Page
from workbench_widgets.app.parts.link_confirmation import awaits_consent
from workbench_widgets.app.server.hosts import Hosts, is_this_machine
from workbench_widgets.app.state.page_state import TEXT_LIMIT, PageState
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels
from workbench_widgets.app.work.workspace import Workspace

TINY = "workbench-tiny"
GONE = "text=The server has gone"
SOON = {"check_unused_sessions_milliseconds": 100, "unused_session_lifetime_milliseconds": 4000}


OTHERS: weakref.WeakSet[Any] = weakref.WeakSet()  # pages and threads that tests of other modules left in this process


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of this process, whose sessions end soon after their visitor left."""
    gc.collect()
    OTHERS.update([*(one for one in gc.get_objects() if type(one) is Page), *threading.enumerate()])
    found = free_port()
    server = serve(port=found, model=TINY, threaded=True, hosts=["proxy.example"], **SOON)
    until(lambda: answers(found))
    yield found
    server.stop()


def get(port: int, query: str = "", host: str = "") -> Any:
    return httpx.get(f"http://127.0.0.1:{port}/{query}", headers={"Host": host or f"127.0.0.1:{port}"}, timeout=120)


def connect(port: int, html: str, host: str, origin: str = "") -> Any:
    """The page's socket, as a browser opens it."""
    token = re.search(r'"token":"([^"]+)"', html)
    assert token is not None
    return websocket.create_connection(
        f"ws://127.0.0.1:{port}/ws",
        host=host,
        origin=f"http://{origin or host}",
        subprotocols=["bokeh", token[1]],
        timeout=60,
    )


def pages() -> list[Any]:
    return [one for one in gc.get_objects() if type(one) is Page and one not in OTHERS]


def only_page() -> Any:
    """The one page there is."""
    (found,) = pages()
    return found


def gone() -> bool:
    gc.collect()
    return not pages()


# -- who is let in


@pytest.mark.parametrize("host", ["localhost:5006", "LOCALHOST:5006", "127.0.0.1:5006", "[::1]:5006"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost", "0.0.0.0", ""])
def test_this_machines_own_names_are_let_in_wherever_it_listens(address: str, host: str) -> None:
    assert Hosts.of(address, 5006).admits(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:5006", "localhost.evil.example:5006", "localhost:5007", "", "a:b:c"],
)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "::", "", "192.168.1.5", "box.lan"])
def test_a_name_that_nobody_allowed_is_not_let_in(address: str, host: str) -> None:
    assert not Hosts.of(address, 5006).admits(host)


def test_the_address_that_is_served_and_what_is_allowed_are_let_in() -> None:
    assert Hosts.of("192.168.1.5", 80).admits("192.168.1.5:80")
    assert Hosts.of("fe80::2", 80).admits("[fe80::2]:80")
    assert not Hosts.of("192.168.1.5", 5006).admits("192.168.1.6:5006")
    assert Hosts.of("0.0.0.0", 5006).admits("192.168.1.6:5006")
    assert Hosts.of("::", 5006).admits("[fe80::2]:5006")
    proxied = Hosts.of("127.0.0.1", 5006, ["Lab.example", "tunnel.example:8000"])
    assert proxied.admits("lab.example") and proxied.admits("lab.example:443") and proxied.admits("tunnel.example:8000")
    assert not proxied.admits("tunnel.example:5006")
    assert Hosts.of("127.0.0.1", 5006, ["*"]).admits("any.example:1")


@pytest.mark.parametrize("host", ["", "http://lab.example", "lab.example/", "a b", "lab.example:port", "a:1:2"])
def test_a_host_that_is_none_is_refused_when_the_server_starts(host: str) -> None:
    with pytest.raises(BadParameter, match="not a name"):
        Hosts.of("127.0.0.1", 5006, [host])


def test_a_request_for_a_foreign_host_gets_no_page_and_no_socket(port: int) -> None:
    own, foreign = f"127.0.0.1:{port}", f"evil.example:{port}"
    served = get(port)
    assert served.status_code == 200
    assert get(port, host=foreign).status_code == 403
    assert get(port, "autoload.js?bokeh-autoload-element=1", host=foreign).status_code == 403
    for host, origin in [(foreign, foreign), (foreign, own), (own, foreign)]:
        with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
            connect(port, served.text, host, origin)
    for host in (own, f"localhost:{port}", "proxy.example"):
        found = connect(port, get(port, host=host).text, host)
        assert "ACK" in found.recv()
        found.close()


def test_a_socket_with_a_token_of_another_server_gets_no_session(port: int) -> None:
    from bokeh.util.token import generate_jwt_token, generate_session_id

    forged = generate_jwt_token(generate_session_id(signed=False), signed=False)
    found = connect(port, f'"token":"{forged}"', f"127.0.0.1:{port}")
    assert found.recv() == ""  # closed
    found.close()


# -- which models


def test_only_what_is_offered_can_be_loaded_and_a_refusal_tells_nothing_of_the_disk(tmp_path: Any) -> None:
    offered = OfferedModels("org/default", more=("org/allowed",))
    for name in ("org/default", "org/allowed", TINY):
        offered.check(name)
    refusals = []
    for name in (str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(ModelNotOffered) as refused:
            offered.check(name)
        refusals.append(str(refused.value).replace(repr(name), "it"))
    assert refusals[0] == refusals[1] and "\n" not in refusals[0]
    OfferedModels("org/default", anything=True).check(str(tmp_path))


def test_a_model_that_is_not_offered_is_refused_before_anything_is_looked_for() -> None:
    class Untouched(LoadedModels):
        def get(self, name: str, progress: Progress) -> Any:
            raise AssertionError(f"{name} was looked for")

    workspace = Workspace(lambda show: show(), Untouched(), OfferedModels(TINY))
    workspace.read("/etc", "text")
    assert "not offered" in workspace.problem and not workspace.main.busy and not workspace.working
    workspace.close()


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("[::1]:80", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("localhost:8000", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.5", False),
        ("box.lan", False),
        ("localhost.evil.example", False),
        ("*", False),
    ],
)
def test_a_server_is_for_this_machine_only_at_loopback_addresses(host: str, here: bool) -> None:
    assert is_this_machine(host) is here


def test_a_link_says_what_it_asks_for_beyond_the_default_page() -> None:
    assert awaits_consent(PageState(), TINY) == []
    assert awaits_consent(PageState(model=TINY, text="short", kv="h2o"), TINY) == []
    found = awaits_consent(PageState(model="a" * 500, weights="gptq", text="x" * (TEXT_LIMIT + 1)), TINY)
    assert len(found) == 3 and len(found[0]) < 100 and "GPTQ" in found[1] and "1,501 characters" in found[2]


# -- what a request sets going


def at_work() -> list[str]:
    """What workers and loading models do: their threads."""
    mine = [one for one in threading.enumerate() if one not in OTHERS]
    return [one.name for one in mine if one.name.startswith(("work", "planning", "load "))]


def test_a_request_alone_computes_nothing_and_a_browser_that_connects_sets_reading_going(port: int) -> None:
    until(lambda: gone() and not at_work())  # the default model is loaded
    host = f"127.0.0.1:{port}"
    html = get(port).text
    page = only_page()
    time.sleep(0.3)  # it looks for its browser meanwhile
    assert not at_work() and not page.workspace.main.busy
    found = connect(port, html, host)
    until(lambda: page.workspace.main.busy)
    found.close()


@pytest.mark.parametrize(
    "query", ["?model=/etc", "?model=nobody/nothing", f"?text={'x' * (TEXT_LIMIT + 1)}", "?weights=gptq"]
)
def test_a_link_that_asks_for_more_waits_for_a_person_although_its_browser_is_there(port: int, query: str) -> None:
    until(lambda: gone() and not at_work())
    html = get(port, query).text
    page = only_page()
    found = connect(port, html, f"127.0.0.1:{port}")
    assert "ACK" in found.recv()
    time.sleep(0.5)
    assert page.confirmation.body.visible and not page.workspace.main.busy and page.workspace.reading is None
    found.close()


# -- what a visit leaves behind


def test_visits_leave_nothing_behind_and_collect_nothing_in_the_event_loop(port: int) -> None:
    from bokeh.document import Document

    until(gone)
    kinds = (Page, Workspace, Document, pn.viewable.Viewable)

    def live() -> dict[str, int]:
        everything = gc.get_objects()
        return {kind.__name__: sum(issubclass(type(one), kind) for one in everything) for kind in kinds}

    before = live()
    for number in range(8):
        html = get(port).text
        if number % 4 == 0:
            connect(port, html, f"127.0.0.1:{port}").close()
    until(gone)
    after = live()
    assert {name: after[name] - before[name] for name in after} == dict.fromkeys(after, 0)
    with pytest.raises(KeyError):  # nobody has asked for one
        pn.state.cancel_task("gc.collect")


# -- the end of a server


@pytest.fixture
def subject() -> Iterator[tuple[Any, int]]:
    """A server in a process of its own, and its port."""
    port = free_port()
    code = (
        f"from workbench_widgets import serve; serve(port={port}, model={TINY!r}, hosts=['127.0.0.1'])"  # at any port
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), 120)
        yield process, port
    finally:
        process.kill()
        process.wait()


class Wire:
    """A connection to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._ends: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while self._door.fileno() >= 0:
            try:
                here, _ = self._door.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._to))
            self._ends += [here, there]
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while part := one.recv(65536):
                other.sendall(part)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return  # cut

    def cut(self) -> None:
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed before
        self._ends.clear()

    def close(self) -> None:
        self._door.close()
        self.cut()


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1920, True)])
def test_a_page_says_that_its_server_has_gone_and_keeps_what_it_shows(
    chromium: Any, subject: tuple[Any, int], width: int, dark: bool
) -> None:
    process, port = subject
    page = watched_page(chromium, width=width, dark=dark).page
    page.set_default_timeout(90_000)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("text=tokens read")
    assert page.locator(GONE).count() == 0
    process.kill()
    page.wait_for_selector(GONE)
    box = page.get_by_role("alert").filter(has_text="The server has gone").bounding_box()
    assert box is not None and box["width"] == width and 0 <= box["y"] <= 900 - box["height"]
    assert page.locator("text=tokens read").is_visible()
    page.close()


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_page_that_was_cut_off_says_so_and_is_back_when_reloaded(chromium: Any, subject: tuple[Any, int]) -> None:
    _, port = subject
    wire = Wire(port)
    page = watched_page(chromium).page
    page.set_default_timeout(90_000)
    page.goto(f"http://127.0.0.1:{wire.port}/")
    page.wait_for_selector("text=tokens read")
    field = page.get_by_label("Question about the text")
    field.fill("Who came back?")
    field.press("Enter")
    page.wait_for_url(re.compile("Who"))
    wire.cut()
    page.wait_for_selector(GONE)
    assert field.input_value() == "Who came back?"
    page.reload()
    page.wait_for_selector("text=tokens read")
    assert page.locator(GONE).count() == 0
    assert page.get_by_label("Question about the text").input_value() == "Who came back?"
    page.close()
    wire.close()


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_link_to_another_model_is_read_when_a_person_says_so(chromium: Any, port: int) -> None:
    watched = watched_page(chromium)
    page = watched.page
    page.set_default_timeout(90_000)
    page.goto(f"http://127.0.0.1:{port}/?model=/nowhere<b>&text=a+short+text")
    page.wait_for_selector("text=This link asks for /nowhere<b>. Nothing is loaded or computed until you say so.")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("text=not offered here")  # this server is reached by the way of a proxy
    page.locator("text=This link asks for").wait_for(state="hidden")
    page.close()
    assert watched.errors == [] and watched.outside == []
