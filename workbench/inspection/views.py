"""What the attention of the model's layers is made of under a recipe: layer by layer, or one query head of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from workbench import arguments
from workbench.inspection.captured import Captured, as_read, capture
from workbench.inspection.implied import Implied
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.runtime.readings import Readings, attention_method, check_together, kv_methods
from workbench.trace import Trace

T = TypeVar("T")
View = Captured | Implied


def view_of(readings: Readings, recipe: Recipe, layer: int, head: int | None, progress: Progress | None = None) -> View:
    """Of one layer, by its number in the model; head: only of that query head.

    Raises BadParameter for one that is not there, NotRead.
    """
    trace = readings.recorded(recipe, progress)
    layer = trace.place(layer)
    if head is not None:
        head = arguments.index("head", head, readings.facts.heads, "the model's query heads")
    return _viewer(readings, recipe, trace, progress)(layer, head)


def of_each_layer(
    readings: Readings, recipe: Recipe, work: Callable[[View, Progress], T], stage: str, progress: Progress | None
) -> list[T]:
    """`work` on all heads of each layer; it can be cancelled within one, and reports there where that takes long."""
    trace = readings.recorded(recipe, progress)
    progress = progress or Progress()
    quiet = Progress(lambda *_: progress.check())
    viewer, results, layers = _viewer(readings, recipe, trace, progress), [], len(trace.layers)
    for layer in progress.track(range(layers), stage, layers):
        view = viewer(layer, None)
        results.append(work(view, progress.part(layer, layers, stage) if isinstance(view, Implied) else quiet))
    return results


def _viewer(
    readings: Readings, recipe: Recipe, trace: Trace, progress: Progress | None
) -> Callable[[int, int | None], View]:
    """What gives the view of a layer and a query head (None: all)."""
    method = attention_method(recipe)
    if method is not None and method.changes_prefill:
        check_together(method, kv_methods(recipe))
        return partial(as_read, method, trace.layers)
    plan = readings.plan(recipe, trace, progress)
    return lambda layer, head: capture(trace.layers[layer], plan, head)
