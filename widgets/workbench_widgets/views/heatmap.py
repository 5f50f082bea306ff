"""A map of any size: attention, a difference of two, or one value for each layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from workbench.errors import BadParameter
from workbench_widgets.views import pictures
from workbench_widgets.views.colour_levels import Scale, quantise, scale_differences, scale_values
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.pooling import pool_map
from workbench_widgets.views.view import View
from workbench_widgets.views.wire import pack

EXACT_CELLS = 512 * 512  # a map of at most so many cells brings its values beside its colours


class Heatmap(View):
    """A map as 255 levels on a canvas, with the values themselves on hover, and in the cells where they are large.

    A click (Enter or Space on the keyboard) sets `selected` to (row, column). With `brush`, dragging sets `window` to
    (r0, r1, c0, c1), half open, in rows and columns of the whole map, and the view zooms there at once; Escape goes
    one step back out, a double click all the way (None). Shift and dragging moves, Ctrl and the wheel zooms; on the
    keyboard arrows, Enter, plus and minus. Python may answer with finer tiles of that window:
    `Heatmap.update(widget, values, at=window)`. A map saves itself as PNG, SVG, CSV and JSON.
    """

    module: ClassVar[str] = "heatmap.js"
    parts: ClassVar[tuple[str, ...]] = ("export.js",)
    tiles: bytes = b""  # uint8 [rows, columns]: 0 nothing here, 1..255 levels
    knots: bytes = b""  # float32 [255]: the true value of each level
    exact: bytes = b""  # float32 [rows, columns]: the true value of each cell; none for very large maps
    extent: tuple[int, int, int, int] = (0, 0, 0, 0)
    tokens: list[str]  # names rows and columns alike where they have no labels of their own
    row_labels: list[str]
    column_labels: list[str]
    row_title: str = ""
    column_title: str = ""
    label: str = ""
    note: str = ""
    unit: str = ""
    diverging: bool = False
    brush: bool = True
    selected: tuple[int, int] | None = None
    window: tuple[int, int, int, int] | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        return [pictures.heatmap(fields)]

    @classmethod
    def data(
        cls,
        values: ArrayLike,
        *,
        scale: Scale = "linear",
        pixels: int = 1024,
        pool: Literal["max", "mean"] = "max",
        at: tuple[int, int, int, int] | None = None,
        knots: ArrayLike | None = None,
        diverging: bool = False,
    ) -> dict[str, object]:
        """Field values from `values` [rows, columns]; NaN draws nothing, and on a log scale neither does anything not
        positive. `diverging`: a difference, whose colours show the sign, and none for zero.

        Beyond `pixels` rows or columns the map is pooled. `at` (r0, r1, c0, c1): which rows and columns of the whole
        map `values` stands for, where it is already pooled or is a part; by default its own. `knots` keeps the
        colours of another map (`pool.scale_values(other, scale)`), so that two maps can be compared. Raises
        `BadParameter` for other shapes.
        """
        array = np.asarray(values, dtype=np.float32)
        if array.ndim != 2:
            raise BadParameter(f"Heatmap: values must be [rows, columns], not of shape {array.shape}")
        extent = (0, array.shape[0], 0, array.shape[1]) if at is None else tuple(int(edge) for edge in at)
        if array.size and (len(extent) != 4 or extent[0] >= extent[1] or extent[2] >= extent[3]):
            raise BadParameter(f"Heatmap: at must be (first row, end row, first column, end column), not {at}")
        pooled = pool_map(array, pixels, pool)
        if diverging:  # of what lies in a cell, the value farthest from zero
            lowest = -pool_map(-array, pixels, pool)
            pooled = np.where(pooled >= -lowest, pooled, lowest)
        shown = np.where(pooled > 0, pooled, np.nan) if scale == "log" and not diverging else pooled
        if knots is not None:
            levels = np.asarray(knots, dtype=np.float32)
        else:
            levels = scale_differences(shown, scale) if diverging else scale_values(shown, scale)
        return {
            "tiles": pack(quantise(shown, levels)),
            "knots": pack(levels),
            "exact": pack(pooled) if pooled.size <= EXACT_CELLS else b"",
            "extent": extent,
            "diverging": diverging,
        }

    @staticmethod
    def grid(values: ArrayLike, *, what: str, unit: str = "", scale: Scale = "linear") -> dict[str, object]:
        """Keywords for a map of one value for each layer and head, `values` [layers, heads], whose cells are selected
        by click: `Heatmap.panel(**Heatmap.grid(errors, what="output error"))`.
        """
        return {
            "values": values,
            "scale": scale,
            "label": what,
            "unit": unit,
            "brush": False,
            "row_title": "layer",
            "column_title": "head",
        }
