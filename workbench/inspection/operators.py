"""Another attention operator on what was recorded of the prompt, beside exact attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from workbench.attention.operators import Operator, Study, study_operator
from workbench.errors import BadParameter
from workbench.formatting import quoted
from workbench.inspection.attention import check_window
from workbench.registry import Method, find

if TYPE_CHECKING:
    from workbench.measure.attention import Pooling, Span
    from workbench.progress import Progress
    from workbench.runtime.readings import Readings


class View(TypedDict, total=False):
    """Which heads and which part of the maps are looked at, as `study` takes them."""

    heads: Iterable[int] | None
    pixels: int
    pooling: Pooling
    rows: Span | None
    cols: Span | None


def operator_of(operator: Operator | str, **parameters: Any) -> Operator:
    """An operator by its key and parameters, or as it is. Raises UnknownMethod, BadParameter."""
    chosen = find(operator)(**parameters) if isinstance(operator, str) else operator
    if not isinstance(chosen, Operator):
        what = chosen.key if isinstance(chosen, Method) else quoted(chosen)
        raise BadParameter(f"{what} is no attention operator: choose one of wb.methods('operator')")
    return chosen


def operator_study(
    readings: Readings,
    operator: Operator,
    layer: int,
    head: int = 0,
    *,
    progress: Progress | None = None,
    **view: Unpack[View],
) -> Study:
    """The errors of some heads and the maps of `head` on one layer; see `Session.operator`."""
    trace = readings.of_prompt()
    check_window(readings, view.get("pixels", 512), view.get("pooling", "max"), view.get("rows"), view.get("cols"))
    return study_operator(trace, operator, layer, head, progress=progress, **view)
