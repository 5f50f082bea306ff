"""Starting the app."""

from __future__ import annotations

import socket
from typing import Any

from workbench.errors import BadParameter, MissingExtra

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
    threaded: bool = False,
    **options: Any,
) -> Any:
    """Serve the workbench until interrupted; with `threaded` return at once, and stop with `.stop()`.

    address, port: where it listens; port 0 takes any free one. model: what a new page loads (a catalogue name, hub id
    or folder); loading begins at once, behind the page. open_browser: show the page in the user's browser. Further
    options go to `panel.serve`. Raises MissingExtra without Panel, BadParameter where the port cannot be taken.
    """
    try:
        import panel as pn

        from workbench_widgets.app.page import page
    except ImportError as error:
        raise MissingExtra(f"the app needs Panel ({error}): pip install 'inference-workbench[app]'") from error
    from workbench_widgets.app.shelf import SHELF

    _check_port(address, port)
    SHELF.warm(model)
    shown = "localhost" if address in ("127.0.0.1", "0.0.0.0", "::") else address
    if port:
        print(f"The workbench is at http://{shown}:{port}/ (stop it with Ctrl+C)", flush=True)
    return pn.serve(
        {"/": lambda: page(model)},
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
            **options,
        },
    )


def _check_port(address: str, port: int) -> None:
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise BadParameter(f"port {port!r} is not a number from 0 to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        reason = error.strerror or error
        raise BadParameter(f"cannot listen on {address} port {port} ({reason}); choose another with port=") from None
