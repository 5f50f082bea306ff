"""A row of numbers: name, value, and what it is measured against."""

from __future__ import annotations

from collections.abc import Iterable

import panel as pn

from workbench_widgets.plain_text import in_markup
from workbench_widgets.present import KeyFigure

_STYLE = """
:host { width: 100%; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); gap: 10px 20px; }
.name { font-size: 12px; opacity: .72; }
.value { font-size: 19px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.note { font-size: 12px; line-height: 1.35; opacity: .72; }
.empty { font-size: 13px; opacity: .72; }
div { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
"""


def figures_row(empty: str = "") -> pn.pane.HTML:
    """A pane for `show`; says `empty` until there is something."""
    return pn.pane.HTML(_markup([], empty), stylesheets=[_STYLE], sizing_mode="stretch_width", margin=(4, 10))


def show(pane: pn.pane.HTML, figures: Iterable[KeyFigure], empty: str = "") -> None:
    """Show figures in a pane that `figures_row` made."""
    pane.object = _markup(list(figures), empty)


def _markup(figures: list[KeyFigure], empty: str) -> str:
    if not figures:
        return f'<div class="empty">{in_markup(empty)}</div>' if empty else ""
    cells = (
        f'<div><div class="name">{in_markup(name)}</div><div class="value">{in_markup(value)}</div>'
        f'<div class="note">{in_markup(note)}</div></div>'
        for name, value, note in figures
    )
    return f'<div class="row">{"".join(cells)}</div>'
