"""What a plan, a run or a session shows in a notebook: the views of this package, put together and linked.

`workbench.display` finds `views` here through its entry point; nothing else needs to import this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import ipywidgets

from workbench.display import Bundle
from workbench.errors import NotRead
from workbench.formatting import mib
from workbench.kv.plan import Plan
from workbench.runtime.run import Run
from workbench.session import Session
from workbench_widgets import figures, present
from workbench_widgets.answer_diff import AnswerDiff
from workbench_widgets.colors import LIGHT
from workbench_widgets.kept_raster import KeptRaster
from workbench_widgets.plain_text import in_markup, out_of_markup
from workbench_widgets.token_text import TokenText

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLOTLY = "application/vnd.plotly.v1+json"
_ANSWER = 160  # characters of an answer in the table of runs


@singledispatch
def views(thing: object) -> Iterator[Bundle]:
    """MIME bundles for `thing`: its view first, then the figures that `show()` adds. Nothing for an unknown type."""
    yield from ()


@views.register
def _(plan: Plan) -> Iterator[Bundle]:
    yield view(PlanView(plan))


@views.register
def _(run: Run) -> Iterator[Bundle]:
    yield view(RunView(run))
    yield figure(memory_figure(run.memory, f"Memory of {run.recipe.label}"))


@views.register
def _(session: Session) -> Iterator[Bundle]:
    yield view(ipywidgets.HTML(session_html(session)))
    if session.runs:
        yield figure(memory_figure(session.memory, "Memory of all runs"))


def view(widget: ipywidgets.DOMWidget) -> Bundle:
    """The bundle that shows a widget."""
    data: Any = widget._repr_mimebundle_()
    return dict(data[0] if isinstance(data, tuple) else data)


def figure(made: go.Figure) -> Bundle:
    """The bundle that shows a Plotly figure in light and dark notebooks alike, without plotly.js in the file."""
    colours = {LIGHT.surface: "rgba(0,0,0,0)", LIGHT.ink: "#808080", LIGHT.muted: "#808080", LIGHT.line: "#80808055"}
    written = made.to_json()
    for colour, neutral in colours.items():
        written = written.replace(f'"{colour}"', f'"{neutral}"')
    content = json.loads(written)
    content["layout"]["hoverlabel"] = {"bgcolor": LIGHT.surface, "font": {"color": LIGHT.ink}, "namelength": -1}
    content["config"] = {"displaylogo": False, "responsive": True}
    return {PLOTLY: content, "text/plain": f"Figure: {out_of_markup(made.layout.title.text)}"}


def memory_figure(timeline: Any, title: str) -> go.Figure:
    """Live bytes over the steps of a timeline, without the weights: they would dwarf everything else."""
    frame = present.memory(timeline).drop(columns="time")
    weights = frame.pop("weights") if "weights" in frame else None
    beside = "" if weights is None or not weights.max() else f", beside {mib(weights.max())} of weights"
    return figures.memory_timeline(frame, title=title + beside)


class PlanView(ipywidgets.VBox):  # type: ignore[misc]
    """A plan's bytes, prompt and kept positions; a clicked row of the raster shows how that head keeps the prompt, a
    clicked token is marked in the raster.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tokens = plan_tokens(plan)
        self.bytes = ipywidgets.HTML(plan_html(plan))
        self.text = TokenText.jupyter(**present.token_text(plan, self._tokens), rows=8)
        self.raster = KeptRaster.jupyter(**present.kept_raster(plan, self._tokens))
        TokenText.watch(self.text, "selected", self._mark)
        KeptRaster.watch(self.raster, "selected", self._choose)
        super().__init__([self.bytes, self.text, self.raster])

    def __repr__(self) -> str:
        return f"PlanView({self._plan.label!r})"

    @property
    def plan(self) -> Plan:
        """The plan shown; assign another one to show it in the same place."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if plan.trace is not self._plan.trace:
            self._tokens = plan_tokens(plan)
        self._plan = plan
        self.bytes.value = plan_html(plan)
        KeptRaster.update(self.raster, **present.kept_raster(plan, self._tokens))
        self._choose(self.raster.selected)

    def _choose(self, selected: tuple[int, int] | None) -> None:
        layers, heads, _ = self._plan.tiers.shape
        inside = selected is not None and selected[0] < layers and selected[1] < heads
        TokenText.update(self.text, **present.token_text(self._plan, self._tokens, selected if inside else None))

    def _mark(self, position: int | None) -> None:
        self.raster.marked = position


class RunView(ipywidgets.VBox):  # type: ignore[misc]
    """The full and the compressed answer side by side, and the run's figures; measures the run if need be."""

    def __init__(self, run: Run) -> None:
        self._label = run.recipe.label
        self.answers = AnswerDiff.jupyter(**run_answers(run))
        self.figures = ipywidgets.HTML(run_html(run))
        super().__init__([self.figures, self.answers])

    def __repr__(self) -> str:
        return f"RunView({self._label!r})"


def plan_tokens(plan: Plan) -> list[str]:
    """The prompt's tokens as text, decoded once."""
    trace = plan.trace
    return trace.once(("pieces",), lambda: present.pieces(trace.prompt.tokenizer, trace.ids))


def run_answers(run: Run) -> dict[str, Any]:
    """Keywords for AnswerDiff; a run loaded from disk that was never measured shows its own answer only."""
    tokenizer = None
    with suppress(NotRead):  # a loaded run whose own reading was not saved
        tokenizer = run.plan.trace.prompt.tokenizer
    try:
        return present.answers(run, tokenizer)
    except NotRead:
        own = present.pieces(tokenizer, run.tokens)
        return {"left": own, "right": own, "left_label": "As recorded", "right_label": run.recipe.label}


def plan_html(plan: Plan) -> str:
    """A plan's bytes as a bar, and what is kept."""
    kept = float(plan.counts.float().mean())
    return _tiles(
        [
            ("method", plan.label),
            ("cache", f"{mib(plan.nbytes)} of {mib(plan.full_nbytes)}"),
            *([("host memory", mib(plan.host_nbytes))] if plan.host_nbytes else []),
            ("kept a head", f"{kept:,.0f} of {plan.trace.tokens:,} tokens"),
        ],
        plan.share,
    )


def run_html(run: Run) -> str:
    """A run's cache, quality and speed."""
    record = run.to_dict(quality=False)
    share = record["kv_share"]
    tiles = [("recipe", run.recipe.label), ("cache", f"{mib(record['kv_nbytes'])} of {mib(record['kv_full_nbytes'])}")]
    if record.get("kv_host_nbytes"):
        tiles.append(("host memory", mib(record["kv_host_nbytes"])))
    with suppress(NotRead):  # loaded from disk, never measured
        quality = run.quality
        tiles += [
            ("KL to full", f"{quality.kl:.3f}"),
            ("same top token", f"{quality.top1_agreement:.0%}"),
            ("perplexity", f"{quality.perplexity:.2f} (full {quality.perplexity_reference:.2f})"),
        ]
    tiles += [
        ("first token", f"{run.timing.first_token_s:.2f} s"),
        ("speed", f"{run.timing.tokens_per_s:.1f} tokens/s"),
    ]
    notes = "".join(f"<div>{in_markup(note)}</div>" for note in run.notes)
    return _tiles(tiles, share) + notes


def session_html(session: Session) -> str:
    """The model, the prompt's first words and a table of the runs."""
    trace = session.trace
    tiles = [("model", session.source), ("layers", str(session.facts.layers))]
    words = ""
    if trace is not None:
        tiles += [("prompt", f"{trace.tokens:,} tokens"), ("runs", str(len(session.runs)))]
        tokens = present.pieces(session.tokenizer, trace.ids[:60])
        more = " …" if trace.tokens > len(tokens) else ""
        words = f'<p style="opacity:.75;margin:4px 0">{in_markup("".join(tokens))}{more}</p>'
    return _tiles(tiles) + words + runs_html(session.runs)


def runs_html(runs: Sequence[Run]) -> str:
    """A table of runs; quality only where it has been measured already."""
    if not runs:
        return ""
    cell = "padding:2px 12px 2px 0;white-space:nowrap"
    number = cell + ";text-align:right"
    heads = [("recipe", cell), ("cache", number), ("KL", number), ("same top token", number), ("tokens/s", number)]
    rows = []
    for run in runs:
        quality = run.quality if run.measured else None
        cells = [
            run.recipe.label,
            f"{run.to_dict(quality=False)['kv_share']:.1%}",
            "–" if quality is None else f"{quality.kl:.3f}",
            "–" if quality is None else f"{quality.top1_agreement:.0%}",
            f"{run.timing.tokens_per_s:.1f}",
        ]
        styled = zip(cells, (style for _, style in heads), strict=True)
        answer = f'<td style="{cell.replace("nowrap", "normal")}">{in_markup(_short(run.text.strip()))}</td>'
        rows.append(
            "<tr>" + "".join(f'<td style="{style}">{in_markup(c)}</td>' for c, style in styled) + answer + "</tr>"
        )
    top = "".join(f'<th style="{style}">{name}</th>' for name, style in [*heads, ("answer", cell + ";text-align:left")])
    top = top.replace(f'"{cell}"', f'"{cell};text-align:left"', 1)
    return f'<table style="border-collapse:collapse;line-height:1.4"><tr>{top}</tr>{"".join(rows)}</table>'


def _short(text: str) -> str:
    return text if len(text) <= _ANSWER else f"{text[:_ANSWER]} …"


def _tiles(entries: Sequence[tuple[str, str]], share: float | None = None) -> str:
    """Named figures in a row that wraps, above a bar of the share of the uncompressed bytes."""
    tiles = "".join(
        f'<div><div style="opacity:.7;font-size:11px">{in_markup(name)}</div>'
        f'<div style="font-weight:600">{in_markup(value)}</div></div>'
        for name, value in entries
    )
    row = f'<div style="display:flex;flex-wrap:wrap;gap:4px 24px;line-height:1.35">{tiles}</div>'
    if share is None:
        return row
    told, width = f"{share:.1%} of the uncompressed cache", f"{min(share, 1):.2%}"
    bar = (
        f'<div role="img" aria-label="{told}" title="{told}" '
        'style="height:6px;margin:6px 0;border-radius:3px;background:#80808040">'
        f'<div style="height:6px;border-radius:3px;background:{LIGHT.categories[0]};width:{width}"></div></div>'
    )
    return row + bar
