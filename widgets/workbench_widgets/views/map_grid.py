"""Small attention maps of every layer and head, with what each head does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from workbench.errors import BadParameter
from workbench_widgets.views import pictures
from workbench_widgets.views.colour_levels import Scale, quantise, scale_differences, scale_values
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.view import View
from workbench_widgets.views.wire import pack


class MapGrid(View):
    """Layer by head, a small map each, on one canvas; the bar below a map has the colour of its head's class.

    Click or press Enter to set `selected` to (layer, head). `sort`: "layer" (rows are layers, columns heads), "class",
    or the name of a measure, largest first; the view has a menu for it.
    """

    module: ClassVar[str] = "map_grid.js"
    parts: ClassVar[tuple[str, ...]] = ("export.js",)
    tiles: bytes = b""  # uint8 [maps, p, p]: 0 nothing here, 1..255 levels of one scale for all
    places: bytes = b""  # int32 [maps, 2]: layer and head of each map
    classes: bytes = b""  # uint8 [maps]: an index into class_names
    class_names: list[str]
    measures: bytes = b""  # float32 [measures, maps]
    measure_names: list[str]
    diverging: bool = False
    sort: str = "layer"
    label: str = "All layers and heads"
    note: str = ""
    selected: tuple[int, int] | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        return [pictures.grid(fields)]

    @classmethod
    def data(
        cls,
        maps: ArrayLike,
        *,
        classes: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        measures: Mapping[str, ArrayLike] | None = None,
        numbers: Sequence[int] = (),
        scale: Scale = "log",
        diverging: bool = False,
    ) -> dict[str, object]:
        """Field values from `maps` [layers, heads, p, p]; NaN draws nothing, nor, unless the scale is linear,
        does what is not positive.

        `classes`: what each head is called, layer by layer [layers x heads]; `class_names` gives their order (and
        colours), by default as they come. `measures`: named numbers, [layers x heads] each, told on hover and to sort
        by. `numbers`: what the layers are called (default: from 0 on). All maps share one colour scale; `diverging`:
        they are differences. Raises `BadParameter` where shapes do not fit.
        """
        array = np.asarray(maps, dtype=np.float32)
        if array.ndim != 4 or array.shape[2] != array.shape[3]:
            raise BadParameter(f"MapGrid: maps must be [layers, heads, p, p], not of shape {array.shape}")
        layers, heads, side, _ = array.shape
        flat = array.reshape(layers * heads, side, side)
        if scale != "linear" and not diverging:
            flat = np.where(flat > 0, flat, np.nan)
        names = list(dict.fromkeys(classes or [])) if class_names is None else list(class_names)
        columns = {name: np.asarray(values, dtype=np.float32).ravel() for name, values in (measures or {}).items()}
        for name, size in {
            "classes": len(classes or []),
            **{name: len(values) for name, values in columns.items()},
        }.items():
            if size != len(flat) and not (name == "classes" and classes is None):
                raise BadParameter(f"MapGrid: {name} has {size} values for {layers} x {heads} heads")
        unknown = set(classes or []) - set(names)
        if unknown:
            raise BadParameter(f"MapGrid: class {min(unknown)!r} is not among class_names {names}")
        kinds = np.array([names.index(name) for name in classes or []], dtype=np.uint8)
        knots = scale_differences(flat, scale) if diverging else scale_values(flat, scale)
        places = np.stack(np.divmod(np.arange(len(flat)), max(heads, 1)), axis=1)
        if numbers:
            places[:, 0] = np.asarray(numbers)[places[:, 0]]
        return {
            "tiles": pack(quantise(flat, knots)),
            "diverging": diverging,
            "places": pack(places.astype(np.int32)),
            "classes": pack(kinds) if classes is not None else b"",
            "class_names": names,
            "measures": pack(np.stack(list(columns.values()))) if columns else b"",
            "measure_names": list(columns),
        }
