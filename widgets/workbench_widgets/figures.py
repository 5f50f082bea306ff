"""Figures made of lines, bars and points, as Plotly figures: the same object in a notebook and in the served app.

Every function takes plain data and returns a `plotly.graph_objects.Figure` in the light or the dark theme. Plotly
reads markup: names, titles, labels and what is told on hover are given to it as `plain_text.in_markup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import BadParameter, MissingExtra
from workbench.measure.memory import HOST
from workbench_widgets.colours import theme
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views.pooling import edges

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike
    from plotly.basedatatypes import BaseTraceType

MIB = 1024**2
_LEGEND = 7  # entries of a legend that stand in one line
QUALITIES: Mapping[str, str] = MappingProxyType(
    {  # columns of Session.compare -> what they are called
        "kl": "KL divergence",
        "top1": "Top-1 agreement",
        "nll_difference": "NLL difference",
        "perplexity": "Perplexity",
    }
)
_BEFORE, _AFTER = "before", "after"
_FEW = 64  # points that are marked one by one
_TEXTS = ("name", "text", "meta", "customdata", "x", "y")  # where a trace may have some


def _plotly() -> Any:  # plotly.graph_objects, which has no types
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise MissingExtra("figures need Plotly: pip install 'inference-workbench[app]'") from error
    return graph_objects


def _columns(frame: pd.DataFrame, needed: Sequence[str], where: str) -> None:
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise BadParameter(
            f"{where}: the frame has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}"
        )


def _figure(traces: list[BaseTraceType], dark: bool, **layout: object) -> go.Figure:
    """A figure with our colours, readable text, and margins that leave room for the labels.

    Every text of `traces` and titles of `layout` is shown as it is; only hover templates are markup.
    """
    colours = theme(dark)
    axis = {
        "gridcolor": colours.line,
        "linecolor": colours.line,
        "zerolinecolor": colours.line,
        "ticks": "outside",
        "tickcolor": colours.line,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    for trace in traces:
        for place in _TEXTS:
            if place in trace and trace[place] is not None:
                trace[place] = _as_text(trace[place])
    layout = {name: _as_text(value) if name.endswith("title_text") else value for name, value in layout.items()}
    figure = _plotly().Figure(traces)
    figure.update_layout(
        template="none",
        paper_bgcolor=colours.surface,
        plot_bgcolor=colours.surface,
        font={"family": "system-ui, Segoe UI, Roboto, Arial, sans-serif", "size": 13, "color": colours.ink},
        colorway=colours.categories,
        margin={"l": 64, "r": 16, "t": 68, "b": 48},
        height=340,
        autosize=True,
        title={"x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": 14}},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
            "bgcolor": "rgba(0,0,0,0)",
        },
        hoverlabel={
            "bgcolor": colours.surface,
            "bordercolor": colours.line,
            "font": {"color": colours.ink, "size": 12},
            "namelength": -1,  # Plotly's own would cut a name at 15 characters
        },
        xaxis=axis,
        yaxis=axis,
    )
    figure.update_layout(**layout)
    return figure


def _as_text(texts: object) -> object:
    """Texts as markup that shows them; numbers as they are."""
    if isinstance(texts, str):
        return in_markup(texts)
    if isinstance(texts, Iterable) and np.asarray(texts).dtype.kind in "OU":
        return [in_markup(text) if isinstance(text, str) else text for text in texts]
    return texts


def _log_axis(values: ArrayLike) -> dict[str, object]:
    """A vertical log axis for these values, with a few round numbers on it; what is not positive does not count."""
    axis: dict[str, object] = {"yaxis_type": "log", "yaxis_tickformat": "~g"}
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    if not numbers.size or numbers.max() < 4 * numbers.min():  # Plotly's own ticks suit a narrow range
        return axis
    low, high = int(np.floor(np.log10(numbers.min()))), int(np.ceil(np.log10(numbers.max())))
    digits = (1, 2, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return {**axis, "yaxis_tickvals": [digit * 10.0**power for power in range(low, high + 1) for digit in digits]}


def memory_timeline(
    frame: pd.DataFrame,
    *,
    dark: bool = False,
    title: str = "Live memory",
    marks: Mapping[str, float] = MappingProxyType({}),
    predicted: Mapping[str, float] = MappingProxyType({}),
) -> go.Figure:
    """Stacked areas of live bytes by category over time; what lies in host memory hangs below zero.

    `frame` has one row a sample: `step` (any ascending number), optionally `time` in seconds (then it is the
    horizontal axis) and `event` (text, shown on hover), and one column of bytes for each category; those that begin
    with "host " lie in host memory. Shown in MiB. marks: names of moments, on the horizontal axis. predicted: names and
    bytes of what was foretold, as lines across.
    """
    go = _plotly()
    _columns(frame, ["step"], "memory_timeline")
    x = frame["time"] if "time" in frame.columns else frame["step"]
    names = [name for name in frame.columns if name not in ("step", "time", "event")]
    colours = theme(dark)
    traces = [
        go.Scatter(
            x=x,
            y=(-1 if str(name).startswith(HOST) else 1) * frame[name] / MIB,
            customdata=frame[name] / MIB,
            name=str(name),
            mode="lines",
            stackgroup="host" if str(name).startswith(HOST) else "device",
            line={"width": 0.5, "shape": "hv", "color": colours.categories[i % len(colours.categories)]},
            hovertemplate="%{customdata:,.2f} MiB",
        )
        for i, name in enumerate(names)
    ]
    here = [name for name in names if not str(name).startswith(HOST)]
    total = frame[here].sum(axis=1) / MIB
    traces.append(
        go.Scatter(
            x=x,
            y=total,
            name="total" if len(here) == len(names) else "on the device",
            mode="lines",
            line={"width": 1.5, "shape": "hv", "color": colours.ink},
            customdata=frame["event"] if "event" in frame.columns else None,
            hovertemplate="%{y:,.2f} MiB" + (" · %{customdata}" if "event" in frame.columns else ""),
        )
    )
    figure = _figure(
        traces,
        dark,
        title_text=title,
        hovermode="x unified",
        xaxis_title_text="seconds" if "time" in frame.columns else "step",
        yaxis_title_text="MiB" if len(here) == len(names) else "MiB (below zero: host memory)",
        yaxis_rangemode="tozero",
    )
    if len(names) > _LEGEND:  # what is pointed at says its name
        figure.update_layout(showlegend=False)
    line = {"color": colours.muted, "width": 1, "dash": "dot"}
    for name, at in marks.items():
        figure.add_vline(x=at, line=line, annotation={"text": in_markup(name), "textangle": -90, "font": {"size": 12}})
    for name, nbytes in predicted.items():
        figure.add_hline(y=nbytes / MIB, line=line, annotation={"text": in_markup(name), "font": {"size": 12}})
    return figure


def outlier_profile(frame: pd.DataFrame, *, dark: bool = False, title: str = "Outliers by layer") -> go.Figure:
    """How far the largest channels stand out, layer by layer.

    `frame` has one row a layer: `layer`, `absmax` (the largest absolute value of any channel), and where known
    `median` (of the channels' absmax), `kurtosis` and `top_share` (share of the energy in the strongest channels,
    0..1). Magnitudes are bars on a log axis; shares are a line on an axis of their own, and kurtosis is told on
    hover.
    """
    go = _plotly()
    _columns(frame, ["layer", "absmax"], "outlier_profile")
    colours = theme(dark)
    has_kurtosis = "kurtosis" in frame.columns
    traces: list[BaseTraceType] = [
        go.Bar(
            x=frame["layer"],
            y=frame["absmax"],
            name="largest channel",
            marker={"color": colours.categories[0]},
            customdata=frame["kurtosis"] if has_kurtosis else None,
            hovertemplate="absmax %{y:.3g}" + (", kurtosis %{customdata:.3g}" if has_kurtosis else ""),
        )
    ]
    if "median" in frame.columns:
        traces.append(
            go.Scatter(
                x=frame["layer"],
                y=frame["median"],
                name="median channel",
                mode="markers",
                marker={"color": colours.ink, "symbol": "line-ew-open", "size": 12, "line": {"width": 2}},
                hovertemplate="%{y:.3g}",
            )
        )
    layout: dict[str, object] = {
        **_log_axis(frame[[name for name in ("absmax", "median") if name in frame.columns]]),
        "yaxis_title_text": "absolute value",
        "xaxis_title_text": "layer",
        "bargap": 0.25,
    }
    if "top_share" in frame.columns:
        traces.append(
            go.Scatter(
                x=frame["layer"],
                y=frame["top_share"],
                name="energy in the strongest channels",
                yaxis="y2",
                mode="lines+markers",
                line={"color": colours.categories[1], "width": 2},
                hovertemplate="%{y:.1%}",
            )
        )
        layout["yaxis2"] = {
            "overlaying": "y",
            "side": "right",
            "range": [0, 1],
            "tickformat": ".0%",
            "showgrid": False,
            "automargin": True,
            "title": {"text": "share of energy", "standoff": 8, "font": {"size": 13}},
        }
    return _figure(traces, dark, title_text=title, hovermode="x unified", **layout)


def lines(
    x: Sequence[object],
    ys: Mapping[str, ArrayLike],
    *,
    title: str,
    x_title: str,
    y_title: str,
    log: bool = False,
    percent: bool = False,
    dark: bool = False,
) -> go.Figure:
    """Several measures along layers, channels or singular values, each a line by its name.

    Names that end in "before" are dashed, in the colour of the one that ends in "after" in their place. On a log axis
    what is not positive leaves a gap. percent: values are shares.
    """
    go = _plotly()
    colours = theme(dark)
    roots = list(dict.fromkeys(_root(name) for name in ys))
    form = ".2%" if percent else ".4~g"
    traces = []
    for name, values in ys.items():
        y = np.asarray(values, dtype=np.float64)
        traces.append(
            go.Scatter(
                x=x,
                y=np.where(y > 0, y, np.nan) if log else y,
                name=name,
                mode="lines+markers" if len(x) <= _FEW else "lines",
                marker={"size": 6},
                line={
                    "width": 1.6,
                    "color": colours.categories[roots.index(_root(name)) % len(colours.categories)],
                    "dash": "dot" if name.endswith(_BEFORE) else "solid",
                },
                hovertemplate=f"%{{y:{form}}}",
            )
        )
    every = np.concatenate([np.ravel(np.asarray(values, dtype=np.float64)) for values in ys.values()] or [np.zeros(0)])
    layout = _log_axis(every) if log else {"yaxis_rangemode": "tozero"}
    if percent:
        layout["yaxis_tickformat"] = ".2~%"
    return _figure(
        traces,
        dark,
        title_text=title,
        hovermode="x unified",
        showlegend=len(ys) > 1,
        xaxis_title_text=x_title,
        yaxis_title_text=y_title,
        **layout,
    )


def bars(
    names: Sequence[str], values: ArrayLike, *, title: str, x_title: str, y_title: str, dark: bool = False
) -> go.Figure:
    """One bar for each name."""
    trace = _plotly().Bar(
        x=list(names),
        y=np.asarray(values),
        marker={"color": theme(dark).categories[0]},
        hovertemplate="%{x}: %{y:.4g}<extra></extra>",
    )
    return _figure(
        [trace],
        dark,
        title_text=title,
        xaxis_title_text=x_title,
        yaxis_title_text=y_title,
        xaxis_type="category",
        bargap=0.25,
    )


def gantt(frame: pd.DataFrame, *, dark: bool = False, title: str = "Iterations") -> go.Figure:
    """Who works when: one row a `server`, a bar from `start` to `end` (seconds) for each iteration, told apart by
    whether it reads prompts (`reading` tokens), makes tokens (`decoding` sequences), or does both.
    """
    go = _plotly()
    _columns(frame, ["server", "start", "end", "reading", "decoding"], "gantt")
    colours = theme(dark)
    reads, makes = frame["reading"] > 0, frame["decoding"] > 0
    kinds = {"reading": reads & ~makes, "decoding": makes & ~reads, "both": reads & makes, "other": ~reads & ~makes}
    traces = [
        go.Bar(
            y=frame["server"][rows],
            x=(frame["end"] - frame["start"])[rows],
            base=frame["start"][rows],
            name=name,
            orientation="h",
            marker={"color": colours.categories[place], "line": {"width": 0}},
            customdata=np.stack([frame["reading"][rows], frame["decoding"][rows]], axis=1),
            hovertemplate="%{base:.3f} s, %{x:.4f} s long: %{customdata[0]} tokens read, %{customdata[1]} made",
        )
        for place, (name, rows) in enumerate(kinds.items())
        if rows.any()
    ]
    return _figure(traces, dark, title_text=title, barmode="overlay", xaxis_title_text="seconds", yaxis_type="category")


def _root(name: str) -> str:
    return name.removesuffix(_BEFORE).removesuffix(_AFTER).rstrip(", ")


def received_line(
    received: ArrayLike,
    tokens: Sequence[str],
    *,
    dark: bool = False,
    title: str = "Attention received",
    points: int = 2000,
) -> go.Figure:
    """What each token of a prompt receives, along its positions, on a log axis.

    `received` [n] from `Session.received`. Of a long prompt the largest of every few tokens is drawn, `points` in
    all; tokens that receive nothing leave a gap.
    """
    go = _plotly()
    values = np.asarray(received, dtype=np.float64)
    starts = edges(len(values), points)
    ends = np.append(starts[1:], len(values))
    at = np.array([low + int(values[low:high].argmax()) for low, high in zip(starts, ends, strict=True)], dtype=int)
    shown = np.where(values[at] > 0, values[at], np.nan)
    trace = go.Scatter(
        x=at,
        y=shown,
        mode="lines+markers" if np.isnan(shown).any() else "lines",  # a token between gaps has no line
        marker={"size": 3},
        line={"width": 1.2, "color": theme(dark).categories[0]},
        text=[repr(str(tokens[i])) for i in at],
        hovertemplate="position %{x:,}: %{text}<br>%{y:.4g}<extra></extra>",
    )
    return _figure(
        [trace],
        dark,
        title_text=title,
        height=220 if title else 190,
        margin={"l": 64, "r": 16, "t": 40 if title else 12, "b": 44},
        hovermode="closest",
        **_log_axis(shown),
        yaxis_title_text="received",
        xaxis_title_text="position",
        xaxis_range=[0, max(1, len(values) - 1)],
    )


def pareto(
    frame: pd.DataFrame,
    *,
    quality: str = "kl",
    nbytes: str = "nbytes",
    method: str = "method",
    also: Sequence[str] = (),
    lower_is_better: bool = True,
    more_is_better: bool = False,
    in_mib: bool = True,
    title_of_x: str = "KV cache, MiB",
    selected: Sequence[int] = (),
    dark: bool = False,
    title: str = "What each byte buys",
) -> go.Figure:
    """Quality against memory, a point a run, and the front of the runs that no other run beats in both.

    `frame` has one row a run with the columns named by `method`, `nbytes` (bytes, or with `in_mib` off what
    `title_of_x` says, where `more_is_better` may hold) and `quality`; `budget` is shown on hover where there is one,
    `run` is the number of the run that a click names. Rows that lack either number are left out. also: further columns
    of which less is better: a run that is better in one of them is beaten by none that is not, and has a ring.
    selected: numbers of runs that stand out.
    """
    go = _plotly()
    _columns(frame, [method, nbytes, quality, *also], "pareto")
    colours = theme(dark)
    rows = frame.dropna(subset=[nbytes, quality])
    rows = rows.assign(run=rows["run"] if "run" in rows.columns else np.arange(1, len(rows) + 1))
    sizes = rows[nbytes].to_numpy(float) / (MIB if in_mib else 1)
    rows = rows.assign(_x=sizes)
    signs = (-1 if more_is_better else 1, 1 if lower_is_better else -1)
    costs = [signs[0] * sizes, signs[1] * rows[quality].to_numpy(float)]
    rows["_best"] = np.isin(np.arange(len(rows)), unbeaten([*costs, *(rows[name].to_numpy(float) for name in also)]))
    symbols = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
    traces: list[BaseTraceType] = []
    unit = " MiB" if in_mib else ""
    for i, (name, runs) in enumerate(rows.groupby(method, sort=True)):
        has_budget = "budget" in runs.columns
        chosen = runs["run"].isin(list(selected))
        traces.append(
            go.Scatter(
                x=runs["_x"],
                y=runs[quality],
                name=str(name),
                meta=[quality],
                mode="markers",
                marker={
                    "color": colours.categories[i % len(colours.categories)],
                    "symbol": symbols[(i // len(colours.categories) + i) % len(symbols)],
                    "size": [15 if one else 10 for one in chosen],
                    "line": {
                        "width": [2 if best else 1 for best in runs["_best"]],
                        "color": [colours.ink if best else colours.muted for best in runs["_best"]],
                    },
                },
                customdata=runs["run"].tolist(),
                text=runs["budget"].astype(str).tolist() if has_budget else None,
                hovertemplate=f"%{{fullData.name}}, run %{{customdata}}<br>%{{x:,.2f}}{unit}<br>%{{meta[0]}} %{{y:.4g}}"
                + ("<br>budget %{text}" if has_budget else "")
                + "<extra></extra>",
            )
        )
    best = front(costs[0].tolist(), costs[1].tolist())
    ordered = rows.iloc[best]
    traces.append(
        go.Scatter(
            x=ordered["_x"],
            y=ordered[quality],
            name="front",
            mode="lines",
            line={"shape": "hv", "dash": "dot", "width": 1.5, "color": colours.muted},
            hoverinfo="skip",
        )
    )
    better = "lower is better" if lower_is_better else "higher is better"
    return _figure(
        traces,
        dark,
        title_text=title,
        hovermode="closest",
        height=420,
        xaxis_title_text=title_of_x,
        yaxis_title_text=f"{QUALITIES.get(quality, quality)} ({better})",
        xaxis_rangemode="tozero",
        yaxis_rangemode="tozero" if lower_is_better else "normal",
    )


def unbeaten(costs: Sequence[ArrayLike]) -> list[int]:
    """Indices of what nothing else beats: at least as good in every cost and better in one. Less is better."""
    table = np.nan_to_num(np.stack([np.asarray(cost, np.float64) for cost in costs], axis=1), nan=np.inf)
    no_worse = (table[:, None] <= table[None]).all(-1)  # [a, b]: a is as good as b in everything
    better = (table[:, None] < table[None]).any(-1)
    return np.flatnonzero(~(no_worse & better).any(0)).tolist()


def front(nbytes: Sequence[float], quality: Sequence[float], *, lower_is_better: bool = True) -> list[int]:
    """Indices of the runs that no other run beats in both bytes and quality, by ascending bytes."""
    sign = 1 if lower_is_better else -1
    best, chosen = float("inf"), []
    for i in sorted(range(len(nbytes)), key=lambda i: (nbytes[i], sign * quality[i])):
        if sign * quality[i] < best:
            best = sign * quality[i]
            chosen.append(i)
    return chosen
