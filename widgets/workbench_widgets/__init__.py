"""The workbench's views, for notebooks and for the served app.

Each view is a function of plain data: `Heatmap.jupyter(values)` makes an anywidget, `Heatmap.panel(values)` a Panel
component. Figures with lines and bars are Plotly's: see `workbench_widgets.figures`. `serve()` starts the app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench_widgets.answer_diff import AnswerDiff
from workbench_widgets.heatmap import Heatmap
from workbench_widgets.kept_raster import KeptRaster
from workbench_widgets.map_grid import MapGrid
from workbench_widgets.token_text import TokenText
from workbench_widgets.view import View

if TYPE_CHECKING:
    from workbench_widgets.app import serve
    from workbench_widgets.attention_view import AttentionView

__all__ = ["AnswerDiff", "AttentionView", "Heatmap", "KeptRaster", "MapGrid", "TokenText", "View", "serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":  # the app needs Panel, the views do not
        from workbench_widgets.app import serve

        return serve
    if name == "AttentionView":  # needs the whole workbench, the views need nothing
        try:
            from workbench_widgets.attention_view import AttentionView
        except ModuleNotFoundError as error:
            if error.name != "ipywidgets":
                raise
            from workbench.errors import MissingExtra

            raise MissingExtra(
                "AttentionView needs ipywidgets: pip install 'inference-workbench[notebooks]'"
            ) from error

        return AttentionView
    raise AttributeError(f"module 'workbench_widgets' has no attribute {name!r}")
