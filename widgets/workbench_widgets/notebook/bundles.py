"""The MIME bundles by which a plan, a run, a session or a folder of results shows itself in a notebook.

`workbench.display` finds `views` through an entry point.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from typing import TYPE_CHECKING

from workbench.cost import Cost
from workbench.cost.serving import Simulation
from workbench.display import Bundle
from workbench.formatting import mib
from workbench.kv.plan import Plan
from workbench.measure.memory import Timeline
from workbench.results import Results
from workbench.runtime.run import Run
from workbench.session import Session
from workbench_widgets import cost_figures, figures, present
from workbench_widgets.colours import LIGHT
from workbench_widgets.html_summaries import results_html, session_html
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.notebook.plan_view import PlanView
from workbench_widgets.notebook.run_view import RunView
from workbench_widgets.plain_text import out_of_markup
from workbench_widgets.views.pictures import PNG, png, words

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLOTLY = "application/vnd.plotly.v1+json"
SUMMARY = "workbench-summary"  # the class of HTML whose evidence stands beside it as text and numbers


def views(thing: object) -> Iterator[Bundle]:
    """MIME bundles for `thing`: its view first, then the figures that `show()` adds. Nothing for an unknown type."""
    if isinstance(thing, Plan):
        yield view(PlanView(thing))
    elif isinstance(thing, Run):
        yield view(RunView(thing))
        yield figure(memory_figure(thing.memory, f"Memory of {thing.recipe.label}"))
    elif isinstance(thing, Cost):
        yield figure(cost_figures.memory(thing))
    elif isinstance(thing, Simulation):
        for draw in (cost_figures.gantt, cost_figures.queue, cost_figures.occupancy):
            yield figure(draw(thing))
    elif isinstance(thing, Session):
        yield markup(session_html(thing), thing.summary())
        if thing.runs:
            yield figure(memory_figure(thing.memory, "Memory of all runs"))
    elif isinstance(thing, Results):
        yield markup(results_html(thing), thing.summary())


def view(widget: Pictured) -> Bundle:
    """The bundle that shows a widget."""
    return dict(widget._repr_mimebundle_())


def markup(page: str, text: str) -> Bundle:
    """The bundle that shows HTML without scripts, and its text as a picture."""
    return {
        "text/html": f'<div class="{SUMMARY}">{page}</div>',
        PNG: b64encode(png([words(text.split("\n"))])).decode(),
    }


def figure(plot: go.Figure) -> Bundle:
    """The bundle that shows a Plotly figure in light and dark notebooks alike, without plotly.js in the file.

    A still picture is added where a notebook is published (`notebooks/execute.py`): JupyterLab would draw it in place
    of the live figure.
    """
    colours = {LIGHT.surface: "rgba(0,0,0,0)", LIGHT.ink: "#808080", LIGHT.muted: "#808080", LIGHT.line: "#80808055"}
    text = plot.to_json()
    for colour, neutral in colours.items():
        text = text.replace(f'"{colour}"', f'"{neutral}"')
    content = json.loads(text)
    content["layout"]["hoverlabel"] = {"bgcolor": LIGHT.surface, "font": {"color": LIGHT.ink}, "namelength": -1}
    content["config"] = {"displaylogo": False, "responsive": True}
    return {
        PLOTLY: content,
        "text/plain": f"Figure: {out_of_markup(plot.layout.title.text)}",
    }


def memory_figure(timeline: Timeline, title: str) -> go.Figure:
    """Live bytes over the steps of a timeline, without the weights: they would dwarf everything else."""
    frame = present.memory(timeline).drop(columns="time")
    weights = frame.pop("weights") if "weights" in frame else None
    beside = "" if weights is None or not weights.max() else f", beside {mib(weights.max())} of weights"
    return figures.memory_timeline(frame, title=title + beside)
