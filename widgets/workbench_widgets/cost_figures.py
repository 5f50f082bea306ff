"""Figures of estimates and simulations: what memory goes to, who works when, queues, caches, and prices of promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench_widgets import figures

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from workbench.cost import Cost
    from workbench.cost.serving import Simulation

_GIB = 2**30
_MOST = 2000  # points of a line


def memory(cost: Cost, *, dark: bool = False) -> go.Figure:
    """Bytes of an estimate by what they are for."""
    held = cost.memory
    parts = {
        "weights": held.weights,
        "KV": held.kv,
        "states": held.states,
        "activations": held.activations,
        "peak": held.peak,
        "capacity": cost.capacity,
    }
    title = f"Memory of {cost.architecture.name} under {cost.recipe.label}: a model"
    sizes = np.array(list(parts.values())) / _GIB
    return figures.bars(list(parts), sizes, title=title, x_title="", y_title="GiB", dark=dark)


def gantt(done: Simulation, *, dark: bool = False) -> go.Figure:
    """Who works when: one row a server, a bar an iteration, by what it does most."""
    return figures.gantt(done.timeline(), dark=dark, title=f"Iterations under {done.policy}: a model")


def queue(done: Simulation, *, dark: bool = False) -> go.Figure:
    """Requests that wait, and sequences that decode, over time."""
    frame = _thinned(done.timeline())
    lines = {"waiting": frame["queue"], "decoding": frame["decoding"]}
    title = f"Queue under {done.policy}: a model"
    return figures.lines(list(frame["start"]), lines, title=title, x_title="seconds", y_title="requests", dark=dark)


def occupancy(done: Simulation, *, dark: bool = False) -> go.Figure:
    """Bytes of caches on each server over time."""
    frame = done.timeline()
    lines, at = {}, np.linspace(0, done.seconds, 400)
    for name in done.servers:
        own = frame[frame["server"] == name].sort_values("start")
        if len(own):
            places = np.searchsorted(own["start"].to_numpy(), at, side="right") - 1
            held = np.where(places >= 0, own["held"].to_numpy()[np.maximum(places, 0)], 0.0)
            lines[name] = held / _GIB
    title = f"Caches under {done.policy}: a model"
    return figures.lines(list(at), lines, title=title, x_title="seconds", y_title="GiB", dark=dark)


def promises(frame: pd.DataFrame, *, dark: bool = False) -> go.Figure:
    """What a million tokens takes on each device against the time between tokens that is promised.

    frame: as `workbench.cost.targets.targets` gives it. Dollars where all have a price, else seconds of a device.
    """
    priced = frame["dollars_per_million"].notna().any()
    column = "dollars_per_million" if priced else "seconds_per_million"
    table = frame.pivot_table(index="promised_s", columns="hardware", values=column, dropna=False)
    lines = {str(name): table[name].to_numpy(dtype=float) for name in table}
    return figures.lines(
        list(table.index),
        lines,
        title="A million tokens against the time between tokens: a model",
        x_title="seconds between tokens, promised",
        y_title="dollars" if priced else "device seconds",
        log=True,
        dark=dark,
    )


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.iloc[:: max(len(frame) // _MOST, 1)]
