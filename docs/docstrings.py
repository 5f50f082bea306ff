"""Docstrings are prose, not Markdown: brackets are shapes, stars are products. Here they are made to mean themselves.

`Prose` does so for mkdocstrings, as an extension of griffe; the catalogue uses `prose` itself.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


def prose(text: str) -> str:
    """A docstring's text as Markdown: code in backquotes and indented blocks stay, all other signs mean themselves."""
    lines = []
    for line in text.splitlines():
        if line.startswith("    "):
            lines.append(line)
            continue
        pieces = re.split(r"(`[^`]*`)", line)
        lines.append("".join(p if p.startswith("`") else re.sub(r"([*_<\[\]#])", r"\\\1", p) for p in pieces))
    return "\n".join(lines)


class Prose(Extension):
    """Every docstring that is loaded, as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = prose(obj.docstring.value)
