"""Where each head's attention goes under a recipe."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from workbench.inspection.captured import changes_reading
from workbench.inspection.views import View, of_each_layer
from workbench.measure.head_classes import HeadStats
from workbench.runtime.readings import Readings, attention_method

if TYPE_CHECKING:
    from workbench.progress import Progress
    from workbench.recipe import Recipe
    from workbench.trace import Trace


def head_stats(readings: Readings, recipe: Recipe, *, progress: Progress | None = None) -> HeadStats:
    """The statistics of every layer's query heads; measured once for each recipe, and remembered with its reading."""
    trace = readings.recorded(recipe, progress)

    def stats(view: View, steps: Progress) -> HeadStats:
        return view.judge(trace.ids, steps)

    return trace.once(
        _key(recipe), lambda: HeadStats.join(of_each_layer(readings, recipe, stats, "judging heads", progress))
    )


def remember(trace: Trace, recipe: Recipe, layers: Sequence[HeadStats]) -> None:
    """Keep statistics that were measured along with something else, one of each layer, for `head_stats`."""
    trace.once(_key(recipe), lambda: HeadStats.join(layers))


def _key(recipe: Recipe) -> tuple[Hashable, ...]:
    """Under what a trace remembers them: of a reading that a method changed there are only one."""
    return (
        ("head_stats",) if changes_reading(attention_method(recipe)) else ("head_stats", recipe.methods, recipe.budget)
    )
