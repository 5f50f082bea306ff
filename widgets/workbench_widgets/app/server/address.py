"""The page's address, as the browser shows it."""

from __future__ import annotations

from typing import Any

import panel as pn
from panel.io.location import Location

THEMES = ("default", "dark")


class Address(Location):
    """The address of a page that is written, and read as text only (`state.PageState`).

    Panel's own reads numbers, JSON and Python in every part of it, and fails on some that are none.
    """

    def _update_synced(self, event: Any = None) -> None:
        """No widget is bound to a part of it."""

    @classmethod
    def take_over(cls, doc: Any) -> None:
        """Stand in for Panel's own in this page, which must not have asked for it yet."""
        if doc.session_context is not None:
            path, _, query = doc.session_context.request.uri.partition("?")
            pn.state._locations[doc] = cls(pathname=path, search=f"?{query}" if query else "")


def choose_theme() -> None:
    """Give the page the theme that its address asks for: Panel's own way of reading it stops at what is no text."""
    asked = (pn.state.session_args or {}).get("theme", [b""])[0].decode(errors="replace")
    if asked:
        setattr(pn.config, "theme", asked if asked in THEMES else THEMES[0])  # noqa: B010  (for mypy it is read-only)
