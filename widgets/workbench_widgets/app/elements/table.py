"""Tables: rows of a data frame, in the page's colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
import panel as pn

# As specific as this, for the design's own style sheet comes later.
_STYLE = """
.pnx-tabulator.tabulator { font-size: 13px; background: transparent; }
.pnx-tabulator.tabulator .tabulator-header .tabulator-sortable .tabulator-col-content { padding: 4px 6px; }
.pnx-tabulator.tabulator .tabulator-header .tabulator-sortable .tabulator-col-content .tabulator-col-title {
  padding-right: 14px; font-size: 12px; white-space: normal;
}
.pnx-tabulator.tabulator .tabulator-header .tabulator-sortable .tabulator-col-content .tabulator-col-sorter {
  right: 4px;
}
.pnx-tabulator.tabulator .tabulator-row .tabulator-cell { padding: 5px 6px; }
"""


def table(
    frame: pd.DataFrame,
    columns: Mapping[str, tuple[str, int]],
    formats: Mapping[str, str],
    *,
    dark: bool,
    right: Sequence[str] = (),
    **options: object,
) -> pn.widgets.Tabulator:
    """A table of the frame's rows, in pages.

    columns: name -> title and width (0: what is left). formats: of numbers, by column; these and those of `right`
    stand at the right.
    """
    from bokeh.models.widgets.tables import NumberFormatter

    shown = {"selectable": False, "pagination": "local", "page_size": 12, **options}
    return pn.widgets.Tabulator(
        frame,
        titles={name: title for name, (title, _) in columns.items()},
        widths={name: width for name, (_, width) in columns.items() if width},
        formatters={
            name: NumberFormatter(format=form, font_style="normal", nan_format="–") for name, form in formats.items()
        },
        text_align=dict.fromkeys((*formats, *right), "right"),
        show_index=False,
        disabled=True,
        layout="fit_columns",
        theme=_theme(dark),
        stylesheets=[_STYLE],
        sizing_mode="stretch_width",
        margin=(4, 0, 12, 0),
        **shown,
    )


def csv_of(frame: pd.DataFrame) -> io.StringIO:
    """A frame as the file that a download gives."""
    return io.StringIO(frame.to_csv(index=False))


def fill(tabulator: pn.widgets.Tabulator, frame: pd.DataFrame, *, dark: bool) -> None:
    """Other rows in a table that `table` made; nothing is sent where nothing has changed."""
    if tabulator.theme != _theme(dark):
        tabulator.theme = _theme(dark)
    if not frame.equals(tabulator.value):
        tabulator.value = frame


def _theme(dark: bool) -> Literal["midnight", "simple"]:
    return "midnight" if dark else "simple"
