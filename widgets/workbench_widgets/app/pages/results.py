"""The Results page: all stored runs, filtered, grouped, compared, pinned, noted and deleted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import panel as pn
import panel_material_ui as pmu

from workbench.errors import WorkbenchError
from workbench.recipe import Recipe
from workbench.results import HIGHER_IS_BETTER, Results
from workbench_widgets import figures
from workbench_widgets.app.elements.table import csv_of, fill, table
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.pages.links import session_link
from workbench_widgets.app.pages.shell import Shell, heading, paper
from workbench_widgets.plain_text import in_markup

MEMORY = MappingProxyType(
    {
        "total_nbytes": "Total, MiB",
        "deployed_nbytes": "Total as deployed, MiB",
        "kv_nbytes": "KV cache, MiB",
        "weight_nbytes": "Weights, MiB",
        "peak_nbytes": "Peak, MiB",
        "kv_host_nbytes": "Host, MiB",
        "tokens_per_s": "Tokens a second",
    }
)
QUALITY = MappingProxyType(
    {
        "correct": "Right answers",
        "kl": "KL divergence",
        "top1": "Top-1 agreement",
        "nll_difference": "NLL difference",
        "score": "Score",
    }
)
_MIB = 2**20
_ROWS = MappingProxyType(
    {  # column -> title, width
        "pinned": ("Pin", 56),
        "model": ("Model", 116),
        "recipe": ("Recipe", 170),
        "task": ("Task", 110),
        "case_number": ("Case", 64),
        "weight_mib": ("Weights MiB", 92),
        "kv_mib": ("KV MiB", 82),
        "total_mib": ("Total MiB", 88),
        "peak_mib": ("Peak MiB", 88),
        "correct": ("Right", 72),
        "full_correct": ("Full right", 72),
        "kl": ("KL", 76),
        "top1": ("Top-1", 70),
        "tokens_per_s": ("Tokens/s", 86),
        "note": ("Note", 110),
        "text": ("Answer", 0),
    }
)
_GROUPS = MappingProxyType(
    {
        "model": ("Model", 130),
        "recipe": ("Recipe", 0),
        "budget": ("Budget", 90),
        "cases": ("Cases", 72),
        "failed": ("Failed", 72),
        "weight_mib": ("Weights MiB", 92),
        "kv_mib": ("KV MiB", 82),
        "total_mib": ("Total MiB", 88),
        "peak_mib": ("Peak MiB", 88),
        "correct": ("Right", 72),
        "full_correct": ("Full right", 72),
        "kl": ("KL", 80),
        "top1": ("Top-1", 74),
        "tokens_per_s": ("Tokens/s", 86),
    }
)
_FORMATS = MappingProxyType(
    {
        **dict.fromkeys(("weight_mib", "kv_mib", "total_mib", "peak_mib"), "0,0.00"),
        "kl": "0.0000",
        "top1": "0.0%",
        "tokens_per_s": "0.0",
    }
)
_BYTES = ("weight_nbytes", "kv_nbytes", "total_nbytes", "peak_nbytes")
_GROUPED = (*_BYTES, "correct", "full_correct", "kl", "top1", "tokens_per_s")
_SIDE_BY_SIDE = ("model", "recipe", "task", "case_number", "correct", "kl", "top1", "kv_nbytes", "total_nbytes", "text")
_ALL = "All"
_BESIDE = """
table { border-collapse: collapse; table-layout: fixed; width: 100%; font: 13px/1.45 system-ui, sans-serif; }
td, th { text-align: left; vertical-align: top; padding: 4px 8px; overflow-wrap: anywhere; }
th { width: 120px; opacity: .75; }
"""


class ResultsPage:
    """Reads and writes one folder of results, which sweeps and searches may be filling meanwhile."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._frame = pd.DataFrame()
        self.shell = Shell("results", self.refresh)
        numbers = results.numbers()
        options: dict[str, Any] = {"size": "small", "width": 190, "margin": (6, 10, 6, 0)}
        models = numbers["models"]
        self.model = pmu.Select(
            label="Model", options=[_ALL, *models], value=models[0] if len(models) == 1 else _ALL, **options
        )
        self.task = pmu.Select(label="Task", options=[_ALL, *numbers["tasks"]], **options)
        self.words = TextField(label="Recipe contains", value="", **options)
        self.state = pmu.Select(label="Show", options=["Done", "Failed", "Pinned", _ALL], **options)
        self.grouped = pmu.Switch(label="One row a recipe", value=False, margin=(14, 10, 6, 0))
        self.x = pmu.Select(label="Across", options={v: k for k, v in MEMORY.items()}, value="total_nbytes", **options)
        self.y = pmu.Select(label="Up", options={v: k for k, v in QUALITY.items()}, value="kl", **options)
        for field in (self.model, self.task, self.words, self.state, self.grouped, self.x, self.y):
            field.param.watch(lambda _: self.refresh(), "value")
        small: dict[str, Any] = {"size": "small", "variant": "outlined", "margin": (6, 6, 6, 0)}
        self.pin = pmu.Button(label="Pin", icon="push_pin", **small)
        self.compare = pmu.Button(label="Compare", icon="compare", **small)
        self.delete = pmu.Button(label="Delete", icon="delete", **small)
        self.reload = pmu.Button(label="Reload", icon="refresh", **small)
        self.note_text = TextField(label="Note on what is chosen", value="", size="small", width=230, margin=(0, 6))
        self.note = pmu.Button(label="Write", icon="edit_note", **small)
        self.download = pmu.FileDownload(
            callback=self._csv, filename="results.csv", label="CSV", width=110, margin=(6, 0)
        )
        self.pin.on_click(lambda _: self._change(self._pin))
        self.note.on_click(lambda _: self._change(self._note))
        self.delete.on_click(lambda _: self._delete())
        self.compare.on_click(lambda _: self._compare())
        self.reload.on_click(lambda _: self.refresh())
        self.said = pn.pane.HTML("", margin=(2, 4), sizing_mode="stretch_width")
        self.table: pn.widgets.Tabulator | None = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0)
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=420, visible=False
        )
        self.beside = pn.Column(sizing_mode="stretch_width", margin=0)
        self._sure: tuple[str, ...] = ()  # what was chosen when Delete was pressed first
        self.view = self.shell.view(
            paper(
                pn.FlexBox(self.model, self.task, self.words, self.state, self.grouped, margin=0),
                pn.FlexBox(
                    self.pin, self.compare, self.delete, self.note_text, self.note, self.download, self.reload, margin=0
                ),
                self.said,
                self._table_at,
            ),
            self.beside,
            paper(heading("What each byte buys"), pn.FlexBox(self.x, self.y, margin=0), self.figure),
        )
        self.shell.ready(self.refresh)

    # -- what is shown

    def refresh(self) -> None:
        """Ask the folder anew, and show what it answers."""
        try:
            frame = self._grouped() if self.grouped.value else self._rows()
        except WorkbenchError as error:
            self.shell.task.problem = str(error)
            return
        self.shell.task.problem = ""
        self._frame = frame
        count = len(self._results)
        where = f"<b>{len(frame):,}</b> of {count:,} rows in {in_markup(str(self._results.path))}"
        empty = "No results yet: a sweep, a search or <b>Choose</b> writes them here."
        self.said.object = f"<div style='font-size: 13px; opacity: .8'>{where if count else empty}</div>"
        self._tabulate(frame)
        self._draw()

    @property
    def condition(self) -> str:
        """What the filters ask for, as SQL."""
        parts = ["true"]
        chosen = {"model": self.model.value, "task": self.task.value}
        parts += [f"{name} = {_quoted(str(value))}" for name, value in chosen.items() if value != _ALL]
        if words := (self.words.value or "").strip():
            parts.append(f"contains(lower(recipe), {_quoted(words.lower())})")
        states = {"Done": "status = 'done'", "Failed": "status = 'failed'", "Pinned": "pinned"}
        parts += [states[str(self.state.value)]] if self.state.value in states else []
        return " AND ".join(parts)

    def _rows(self) -> pd.DataFrame:
        names = [
            *dict.fromkeys([*(n for n in _ROWS if not n.endswith("_mib")), *_BYTES, "key", "error", "recipe_json"])
        ]
        frame = self._results.sql(
            f"SELECT {', '.join(names)} FROM runs WHERE {self.condition} ORDER BY pinned DESC NULLS LAST, started DESC, key"  # noqa: E501, S608  names of ours; values are quoted
        )
        frame["text"] = frame["text"].where(frame["error"].isna(), frame["error"])
        for name in ("correct", "full_correct"):
            frame[name] = frame[name].map({True: "yes", False: "no"}).fillna("–")
        frame["pinned"] = frame["pinned"].map({True: "●"}).fillna("")
        return _in_mib(frame)

    def _grouped(self) -> pd.DataFrame:
        frame = self._results.recipes(*_GROUPED, where=self.condition)
        for name in ("correct", "full_correct"):
            frame[name] = [f"{value:.0%}" if value == value else "–" for value in frame[name].astype(float)]  # noqa: PLR0124  NaN
        return _in_mib(frame)

    def _tabulate(self, frame: pd.DataFrame) -> None:
        columns = _GROUPS if self.grouped.value else _ROWS
        shown = frame.reindex(columns=list(columns))
        dark = self.shell.task.dark
        if self.table is not None and list(self.table.value.columns) == list(columns):
            self.table.param.update(selection=[], hidden_columns=self._told_above())
            fill(self.table, shown, dark=dark)
            return
        formats = {name: form for name, form in _FORMATS.items() if name in columns}
        self.table = table(
            shown, columns, formats, dark=dark, pagination="remote", selectable="checkbox",
            hidden_columns=self._told_above(),
        )  # fmt: skip
        self._table_at.objects = [self.table]

    def _told_above(self) -> list[str]:
        """The columns that would say the same in every row, as a filter does."""
        return [name for name, field in (("model", self.model), ("task", self.task)) if field.value != _ALL]

    def _draw(self) -> None:
        """The front, within one model: figures of several do not compare."""
        x, y = str(self.x.value), str(self.y.value)
        models = self._results.numbers()["models"] if self.model.value == _ALL else [str(self.model.value)]
        if len(models) != 1:
            self.figure.visible = False
            if models:
                self.shell.note.say("Choose one model to see its front: figures of several models do not compare.")
            return
        self.shell.note.say("")
        frame = self._results.recipes(x, y, where=self.condition).dropna(subset=[x, y])
        self.figure.visible = not frame.empty
        if frame.empty:
            return
        frame = frame.assign(method=frame["recipe"].str.split().str[0])
        self.figure.object = front_figure(frame, x, y, dark=self.shell.task.dark)

    # -- what a person does

    def _chosen(self) -> list[str]:
        """The keys of the rows that are ticked; of one row a recipe, those of all its cases."""
        ticked = [] if self.table is None else list(self.table.selection)
        rows = self._frame.iloc[ticked]
        if not self.grouped.value:
            return [str(key) for key in rows["key"]]
        found: list[str] = []
        for row in rows.to_dict("records"):
            same = f"recipe_json = {_quoted(row['recipe_json'])} AND model = {_quoted(row['model'])}"
            found += [str(each["key"]) for each in self._results.rows(f"{same} AND {self.condition}")]
        return found

    def _change(self, change: Any) -> None:
        keys = self._chosen()
        if not keys:
            self.shell.task.problem = "Tick rows first: nothing is chosen."
            return
        try:
            change(keys)
        except WorkbenchError as error:
            self.shell.task.problem = str(error)
            return
        self.refresh()

    def _pin(self, keys: Iterable[str]) -> None:
        wanted = list(keys)
        rows = self._results.rows("key IN (SELECT unnest(?))", [wanted])
        pinned = not all(row["pinned"] for row in rows)
        for key in wanted:
            self._results.pin(key, pinned)

    def _note(self, keys: Iterable[str]) -> None:
        text = (self.note_text.value or "").strip() or None
        for key in keys:
            self._results.note(key, text)

    def _delete(self) -> None:
        keys = tuple(self._chosen())
        if keys and keys != self._sure:
            self._sure = keys
            self.shell.note.say(f"Press Delete once more to delete {len(keys):,} rows.", severity="warning")
            return
        self._sure = ()
        self._change(self._results.delete)

    def _compare(self) -> None:
        keys = self._chosen()
        rows = self._results.rows("key IN (SELECT unnest(?))", [keys]) if keys else []
        if len(rows) < 2:
            self.shell.task.problem = "Tick two rows or more to compare them."
            return
        self.shell.task.problem = ""
        self.beside.objects = [paper(heading("Side by side"), _side_by_side(rows))]

    def _csv(self) -> io.StringIO:
        return csv_of(self._results.frame(self.condition))


def front_figure(frame: pd.DataFrame, x: str, y: str, *, dark: bool) -> Any:
    """Recipes of one model by two figures, with the front of those that no other beats in both."""
    in_mib = x != "tokens_per_s"
    return figures.pareto(
        frame,
        quality=y,
        nbytes=x,
        lower_is_better=y not in HIGHER_IS_BETTER,
        more_is_better=x in HIGHER_IS_BETTER,
        in_mib=in_mib,
        title_of_x=MEMORY[x],
        dark=dark,
        title=f"{QUALITY[y]} against {MEMORY[x].partition(',')[0].lower()}",
    )


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> pn.pane.HTML:
    cells = [
        f"<tr><th scope=row>{in_markup(name.replace('_nbytes', ', MiB').replace('_', ' '))}</th>"
        + "".join(f"<td>{in_markup(_cell(name, row[name]))}</td>" for row in rows) + "</tr>"
        for name in _SIDE_BY_SIDE
    ]  # fmt: skip
    links = "".join(f"<td>{_open(row)}</td>" for row in rows)
    return pn.pane.HTML(
        f"<table>{''.join(cells)}<tr><th scope=row></th>{links}</tr></table>",
        stylesheets=[_BESIDE],
        sizing_mode="stretch_width",
    )


def _open(row: Mapping[str, Any]) -> str:
    try:
        recipe = Recipe.from_dict(json.loads(row["recipe_json"]))
    except (WorkbenchError, TypeError, ValueError):
        return ""
    return f'<a href="{in_markup(session_link(recipe, str(row["model"] or "")))}">Open as session</a>'


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.endswith("_nbytes"):
        return f"{value / _MIB:,.2f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_mib(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{name.replace("_nbytes", "_mib"): frame[name] / _MIB for name in _BYTES})


def _quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
