"""The workbench's views, for notebooks and for the served app.

Each view is a function of plain data: `Heatmap.jupyter(values)` makes an anywidget, `Heatmap.panel(values)` a Panel
component. Figures with lines and bars are Plotly's: see `workbench_widgets.figures`. `serve()` starts the app.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from workbench_widgets.views import AnswerDiff, Heatmap, KeptRaster, MapGrid, TokenText, View

if TYPE_CHECKING:
    from workbench_widgets.app.serve import serve
    from workbench_widgets.notebook import AttentionView

__all__ = ["AnswerDiff", "AttentionView", "Heatmap", "KeptRaster", "MapGrid", "TokenText", "View", "serve"]


def __getattr__(name: str) -> object:
    if name == "serve":  # the app needs Panel, the views do not
        return import_module("workbench_widgets.app").serve
    if name == "AttentionView":  # needs the whole workbench, the views need nothing
        try:
            return import_module("workbench_widgets.notebook").AttentionView
        except ModuleNotFoundError as error:
            if error.name != "ipywidgets":
                raise
            from workbench.errors import MissingExtra

            raise MissingExtra(
                "AttentionView needs ipywidgets: pip install 'inference-workbench[notebooks]'"
            ) from error
    raise AttributeError(f"module 'workbench_widgets' has no attribute {name!r}")
