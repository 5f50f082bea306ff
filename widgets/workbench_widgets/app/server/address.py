"""The page's address, as the browser shows it."""

from __future__ import annotations

from typing import Any

import panel as pn
from bokeh.document import Document
from panel.io.location import Location
from param.parameterized import Event

THEMES = ("default", "dark")


class Address(Location):
    """The address of a page that is written, and read as text only (`state.PageState`).

    Panel's own reads numbers, JSON and Python in every part of it, and fails on some that are none.
    """

    def _update_synced(self, event: Event | None = None) -> None:
        """No widget is bound to a part of it."""

    @classmethod
    def take_over(cls, doc: Document) -> None:
        """Stand in for Panel's own in this page, which must not have asked for it yet."""
        context: Any = doc.session_context  # Bokeh types what all contexts have; those of a server have a request
        if context is not None:
            path, _, query = context.request.uri.partition("?")
            # Panel has no other place where a page's address could be given to it.
            pn.state._locations[doc] = cls(pathname=path, search=f"?{query}" if query else "")  # noqa: SLF001


def choose_theme() -> None:
    """Give the page the theme that its address asks for: Panel's own way of reading it stops at what is no text."""
    asked = (pn.state.session_args or {}).get("theme", [b""])[0].decode(errors="replace")
    if asked:
        setattr(pn.config, "theme", asked if asked in THEMES else THEMES[0])  # noqa: B010  (for mypy it is read-only)
