"""Plotly figures as still pictures: the traces that `figures` draws (lines, areas, points, bars), on the same axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from workbench_widgets.colours import LIGHT
from workbench_widgets.plain_text import out_of_markup
from workbench_widgets.views.pictures import Drawing, drawable, label, png

if TYPE_CHECKING:
    import plotly.graph_objects as go

_DASHES = {"dot": ":", "dash": "--", "dashdot": "-."}
_MARKERS = {
    "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X", "star": "*", "pentagon": "p",
    "line-ew-open": "_",
}  # fmt: skip
_TALLEST = 1200  # pixels
_LONG = 14  # letters of the names below bars that still stand side by side


def figure_png(plot: go.Figure) -> bytes:
    """A figure of ours as a PNG, in the light theme."""
    height = min(max(plot.layout.height or 340, 340), _TALLEST) / 100
    return png([Drawing(height, lambda axes: _paint(plot, axes))])


def _paint(plot: go.Figure, axes: Any) -> None:
    layout = plot.layout
    second = axes.twinx() if any(trace.yaxis == "y2" for trace in plot.data) else None
    below: dict[str, Any] = {}  # where the next area of a stack begins
    for trace in plot.data:
        on = second if trace.yaxis == "y2" else axes
        if trace.type == "bar":
            _bars(trace, on)
        else:
            _line(trace, on, below)
    label(axes, _text(layout.title), _text(layout.xaxis.title), _text(layout.yaxis.title))
    if layout.yaxis.type == "log":
        axes.set_yscale("log")
    elif layout.yaxis.rangemode == "tozero":
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if layout.xaxis.type == "log":
        axes.set_xscale("log")
    if "%" in (layout.yaxis.tickformat or ""):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}" if value > 1 else f"{value:.0%}")
    if second is not None:
        label(second, y=_text(layout.yaxis2.title))
        second.set_ylim(*(layout.yaxis2.range or (None, None)))
    axes.grid(color=LIGHT.line, linewidth=0.6, axis="y")
    axes.set_axisbelow(True)
    named = [trace for trace in plot.data if trace.name and trace.showlegend is not False]
    if len(named) > 1 and layout.showlegend is not False:
        handles = [entry for on in (axes, second) if on is not None for entry in on.get_legend_handles_labels()[0]]
        axes.legend(
            handles=handles, fontsize=7.5, framealpha=0.85, edgecolor=LIGHT.surface, ncols=2 if len(handles) > 6 else 1
        )


def _line(trace: Any, axes: Any, below: dict[str, Any]) -> None:
    x, y = _names(trace.x), _names(trace.y)
    mode = trace.mode or "lines"
    line, marker = trace.line, trace.marker
    colour = _colour(line.color or marker.color)
    steps = {"drawstyle": "steps-post"} if line.shape == "hv" else {}
    if trace.stackgroup:
        floor = below.get(trace.stackgroup, np.zeros(len(y)))
        top = floor + y
        axes.fill_between(x, floor, top, color=colour, linewidth=0, step="post", label=_name(trace))
        below[trace.stackgroup] = top
        return
    size: Any = marker.size if np.isscalar(marker.size) and marker.size else 6
    axes.plot(
        x, y, label=_name(trace), color=colour, linewidth=line.width or 1.4,
        linestyle=_DASHES.get(line.dash, "-") if "lines" in mode else "none",
        marker=_MARKERS.get(str(marker.symbol), "o") if "markers" in mode else None,
        markersize=0.6 * float(size), **steps,
    )  # fmt: skip


def _bars(trace: Any, axes: Any) -> None:
    colour = _colour(trace.marker.color)
    if trace.orientation == "h":
        axes.barh(_names(trace.y), np.asarray(trace.x), left=trace.base, color=colour, label=_name(trace))
        return
    names = _names(trace.x)
    axes.bar(names, np.asarray(trace.y), color=colour, width=0.75, label=_name(trace))
    if any(isinstance(name, str) and len(name) > _LONG for name in names):
        axes.tick_params(axis="x", rotation=30)


def _names(values: Any) -> Any:
    array = np.asarray(values)
    return [drawable(out_of_markup(str(name))) for name in array] if array.dtype.kind in "OU" else array


def _name(trace: Any) -> str:
    return drawable(out_of_markup(trace.name or ""))


def _text(title: Any) -> str:
    return out_of_markup(title.text or "")


def _colour(colour: Any) -> str:
    return colour if isinstance(colour, str) and colour.startswith("#") else LIGHT.categories[0]
