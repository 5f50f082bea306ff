"""Attention maps under a recipe: of one query head, of all of them, and what each token receives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench import arguments
from workbench.inspection.heads import remember
from workbench.inspection.implied import Implied
from workbench.inspection.views import View, of_each_layer, view_of
from workbench.measure.attention import PooledMap, Pooling, Span, check_pooling
from workbench.measure.grid import GridOfMaps
from workbench.measure.head_classes import HeadStats

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.progress import Progress
    from workbench.recipe import Recipe
    from workbench.runtime.readings import Readings


def attention_map(
    readings: Readings,
    recipe: Recipe,
    layer: int,
    head: int,
    *,
    pixels: int = 512,
    pooling: Pooling = "max",
    rows: Span | None = None,
    cols: Span | None = None,
    progress: Progress | None = None,
) -> PooledMap:
    """The map of one query head, pooled to at most pixels x pixels cells; see `Session.attention`."""
    check_window(readings, pixels, pooling, rows, cols)
    view = view_of(readings, recipe, layer, head, progress)
    return view.maps(pixels=pixels, pooling=pooling, rows=rows, cols=cols, progress=progress)[0]


def attention_grid(
    readings: Readings,
    recipe: Recipe,
    *,
    pixels: int = 32,
    pooling: Pooling = "max",
    progress: Progress | None = None,
) -> GridOfMaps:
    """The maps of all layers and query heads; see `Session.attention_grid`."""
    check_window(readings, pixels, pooling)
    trace = readings.recorded(recipe, progress)
    surveyed: list[HeadStats] = []

    def maps(view: View, steps: Progress) -> list[PooledMap]:
        if isinstance(view, Implied) and pooling == "max":
            largest, stats = view.survey(trace.ids, pixels=pixels, progress=steps)
            surveyed.append(stats)
            return largest
        return view.maps(pixels=pixels, pooling=pooling, progress=steps)

    grid = GridOfMaps.of(of_each_layer(readings, recipe, maps, "attention maps", progress), trace.numbers)
    if surveyed:
        remember(trace, recipe, surveyed)
    return grid


def received(
    readings: Readings, recipe: Recipe, layer: int, head: int | None = None, *, progress: Progress | None = None
) -> Tensor:
    """What each token receives from all queries together: [n] float32, on the CPU; head: None: the heads' mean."""
    return view_of(readings, recipe, layer, head, progress).received(progress).mean(dim=0)


def check_window(
    readings: Readings, pixels: int, pooling: Pooling, rows: Span | None = None, cols: Span | None = None
) -> None:
    """Raise BadParameter for a map that cannot be made of the prompt, before anything is computed for it."""
    check_pooling(pixels, pooling)
    if readings.plain is None:
        return
    for name, span in (("rows", rows), ("cols", cols)):
        if span is not None:
            arguments.span(name, span, readings.plain.tokens)
