"""Starting the app."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from secrets import token_bytes
from typing import Any

from workbench.errors import BadParameter, MissingExtra
from workbench.files.folders import located

DEFAULT_MODEL = "smollm2-135m"
_LARGEST_TEXT = 2**26  # bytes that one change in a page may send; Bokeh's own limit of 20 MiB would cut the connection
_LARGEST_ADDRESS = 2**21  # bytes of a request's head: browsers send no longer address, Tornado takes 64 KiB
_PATIENCE_MS = 120_000  # so long a page that was sent waits for its browser, which may be busy


def serve(
    address: str = "127.0.0.1",
    port: int = 5006,
    model: str = DEFAULT_MODEL,
    open_browser: bool = False,
    *,
    models: Sequence[str] = (),
    hosts: Sequence[str] = (),
    pages: str | Path | None = None,
    results: str | Path = "results",
    threaded: bool = False,
    **options: Any,
) -> Any:
    """Serve the workbench until interrupted; with `threaded` return at once, and stop with `.stop()`.

    address, port: where it listens; port 0 takes any free one. model: what a new page begins with (a catalogue name,
    hub id or folder); loading begins at once, behind the page. open_browser: show the page in the user's browser.

    models: what visitors may load besides `model` and the packaged ones; "*" stands for anything. They may load
    anything as long as only this machine reaches the server: `address` is a loopback address, and so are all `hosts`.
    hosts: at which other hosts, as "name" or "name:port", the page is asked for, by the way of a proxy or a tunnel; "*"
    stands for any. Without them the server answers at this machine's own names, `address`, and, where it listens on
    all addresses, any of them as a number. results: the folder that the pages Choose and Results write and read; where
    other machines reach the server, each visitor has a folder of their own, gone with the tab.

    pages: the folder in which pages are kept while people work, so that a reload or a link brings them back (default:
    in the user's cache).

    Further options go to `panel.serve`; its `websocket_origin` counts as `hosts`, and where it asks people to log in
    (`basic_auth`, `oauth_provider`) that takes the place of the check of hosts. Raises MissingExtra without Panel,
    BadParameter where the port cannot be taken or a host is none.
    """
    try:
        import panel as pn

        from workbench_widgets.app.page import page
    except ImportError as error:
        raise MissingExtra(f"the app needs Panel ({error}): pip install 'inference-workbench[app]'") from error
    from workbench_widgets.app.server.hosts import HostCheck, Hosts, is_this_machine, is_unspecified
    from workbench_widgets.app.work.loaded_models import LoadedModels
    from workbench_widgets.app.work.offered_models import OfferedModels
    from workbench_widgets.app.work.saved_page import KeptPages

    port = _check_port(address, port)
    other_hosts = list(hosts)
    for name in ("websocket_origin", "allow_websocket_origin"):
        origins = options.pop(name, None) or ()
        other_hosts += [origins] if isinstance(origins, str) else origins
    admitted = Hosts.of(address, port, other_hosts)
    only_this_machine = all(is_this_machine(host) for host in [address, *other_hosts])
    offered = OfferedModels(model, tuple(models), anything=only_this_machine or "*" in models)
    loaded, kept = LoadedModels(), KeptPages(None if pages is None else located(pages))
    loaded.warm(model)
    name = "localhost" if address in ("127.0.0.1", "::1") or is_unspecified(address) else address
    print(f"The workbench is at http://{name}:{port}/ (stop it with Ctrl+C)", flush=True)  # noqa: T201  (where it is, for whoever started it)
    return pn.serve(
        {"/": lambda: page(offered, loaded, results, kept)},
        address=address,
        port=port,
        show=open_browser,
        threaded=threaded,
        **{
            "title": "Inference workbench",
            "verbose": False,
            "unused_session_lifetime_milliseconds": _PATIENCE_MS,
            "websocket_max_message_size": _LARGEST_TEXT,
            "http_server_kwargs": {"max_header_size": _LARGEST_ADDRESS},
            "sign_sessions": True,  # sockets belong to pages that this process has sent
            "secret_key": token_bytes(32),
            "auth_provider": HostCheck(admitted),
            "websocket_origin": admitted.origins,
            **options,
        },
    )


def _check_port(address: str, port: int) -> int:
    """The port, a free one for 0. Raises BadParameter where it cannot be had."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise BadParameter(f"port {port!r} is not a number from 0 to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror or error
        raise BadParameter(f"cannot listen on {address} port {port} ({reason}); choose another with port=") from None
