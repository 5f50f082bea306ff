"""The views: each a function of plain data, for notebooks (anywidget), the app (Panel) or a page of its own."""

from workbench_widgets.views.answer_diff import AnswerDiff
from workbench_widgets.views.heatmap import Heatmap
from workbench_widgets.views.kept_raster import KeptRaster
from workbench_widgets.views.map_grid import MapGrid
from workbench_widgets.views.token_text import TokenText
from workbench_widgets.views.view import View

__all__ = ["AnswerDiff", "Heatmap", "KeptRaster", "MapGrid", "TokenText", "View"]
