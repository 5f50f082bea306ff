"""All runs so far: a table, a file, what each byte buys among those that can be compared; and many at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import pandas as pd
import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.recipe import Recipe
from workbench_widgets import figures
from workbench_widgets.app.elements.download import Download
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.elements.table import csv_of, fill, table
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.parts.compare_form import CompareForm
from workbench_widgets.app.parts.run_details import RunDetails
from workbench_widgets.app.work.records import GROUP, Record
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_label
from workbench_widgets.present import method_names

ALL = ""  # the group of all runs
MIB = 2**20
_COLUMNS = MappingProxyType(
    {  # column -> title, width; the file has all there is
        "run": ("#", 36),
        "mark": ("", 28),
        "recipe": ("Recipe", 140),
        "prompt": ("Prompt", 120),
        "question": ("Question", 120),
        "model": ("Model", 100),
        "kv_share": ("Share", 60),
        "kv_mib": ("KV MiB", 66),
        "weight_mib": ("Weights MiB", 74),
        "total_mib": ("Total MiB", 66),
        "peak_mib": ("Peak MiB", 66),
        "host_mib": ("Host MiB", 66),
        "score_share": ("Scores", 64),
        "kl": ("KL", 66),
        "top1": ("Top-1", 62),
        "right": ("Right", 84),
        "tokens_per_s": ("Tokens/s", 74),
        "text": ("Answer", 0),
    }
)
_MEANINGS = MappingProxyType(
    {  # column -> what its title says when it is pointed at
        "prompt": "The text that was read; runs on other texts are not compared",
        "kv_share": "Bytes of the cache, of the uncompressed one's",
        "weight_mib": "The weights as they lie in memory here",
        "total_mib": "Cache, states and weights on the device",
        "peak_mib": "The most that was live on the device at once, reading included",
        "score_share": "Attention score entries computed while the prompt was read, of all causal ones",
        "top1": "Positions at which the most likely token is that of the uncompressed run",
        "right": "Whether the answer holds what is expected; where it does not, what of the uncompressed model's",
    }
)
AXES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # what a point stands above -> column, title
        "Total on the device": ("total_nbytes", "cache, states and weights, MiB"),
        "KV cache": ("kv_nbytes", "KV cache, MiB"),
        "Weights": ("weight_nbytes", "weights as they lie in memory, MiB"),
        "Host memory": ("kv_host_nbytes", "cache in host memory, MiB"),
        "Peak": ("peak_nbytes", "the most that was live at once, MiB"),
        "Tokens a second": ("tokens_per_s", "tokens a second (higher is better)"),
    }
)
_SELDOM = ("host_mib", "score_share", "right")  # columns that are there when they say something


class RunsPanel(Panel):
    """`compare(recipes, budgets, as_it_is)` is called with recipes, budgets as text, and recipes with their own budget;
    `restore(record)` to have the page of a run again; `on_screen()` gives the page's recipe, None if there is none.
    """

    title = "Runs"
    needs = ("records", "working", "reading", "shown")

    def __init__(
        self,
        workspace: Workspace,
        compare: Callable[[Sequence[Recipe], Sequence[str], Sequence[Recipe]], None],
        restore: Callable[[Record], None],
        on_screen: Callable[[], Recipe | None],
    ) -> None:
        self.form = CompareForm(compare, on_screen)
        self._quiet = Quiet()
        self._latest = 0  # the newest run that was seen
        slim: dict[str, object] = {"size": "small", "margin": (8, 4), "visible": False}
        self.group = pmu.Select(label="Runs of", options={"all": ALL}, value=ALL, min_width=300, **slim)
        self.axis = pmu.Select(label="Against", options={a: a for a in AXES}, value=next(iter(AXES)), width=190, **slim)
        self.quality = pmu.Select(
            label="Quality",
            options={title: name for name, title in figures.QUALITIES.items()},
            width=190,
            **slim,
        )
        self.download = Download(
            callback=self._csv, filename="runs.csv", label="CSV", width=110, disabled=True, margin=(8, 4)
        )
        for widget in (self.group, self.axis, self.quality):
            widget.param.watch(self._chosen, "value")
        self.table: pn.widgets.Tabulator | None = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0)
        self.details = RunDetails(workspace, restore)
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=420, visible=False
        )
        self.figure.param.watch(self._clicked, "click_data")
        self._hint = hint(
            "No runs yet. Press <b>Run</b> above, or compare several recipes here; every run becomes a row."
        )
        self._apart = hint("Choose one text and question to see what each byte buys: others do not compare.")
        self.body = pn.Column(
            self.form.body,
            self._hint,
            pn.FlexBox(self.group, self.download, align_items="center", sizing_mode="stretch_width"),
            self._table_at,
            self.details.body,
            pn.FlexBox(self.axis, self.quality, align_items="center", sizing_mode="stretch_width"),
            self._apart,
            self.figure,
            sizing_mode="stretch_width",
            margin=(6, 0),
        )
        self._apart.visible = False
        super().__init__(workspace)

    @property
    def chosen(self) -> list[Record]:
        """The records of the group that is chosen."""
        records = self.workspace.records
        return [r for r in records if self.group.value in (ALL, _key(r))]

    def refresh(self) -> None:
        workspace = self.workspace
        records = workspace.records
        self.form.enable(not workspace.working and workspace.reading is not None)
        self.download.disabled = not records
        self._hint.visible = not records
        self._offer_groups(records)
        self.details.refresh()
        chosen = self.chosen
        if not records:
            self.figure.visible = self._table_at.visible = self.axis.visible = self.quality.visible = False
            self._apart.visible = False
            return
        self._table_at.visible = True
        rows = _shown(chosen)
        self._tabulate(rows, _hidden(chosen))
        comparable = _comparable(chosen)
        several = len({_key(r) for r in chosen}) > 1
        self.axis.visible = self.quality.visible = self.figure.visible = not (several or comparable.empty)
        self._apart.visible = several
        if self.figure.visible:
            self.figure.object = self._front(comparable)

    def _front(self, rows: pd.DataFrame) -> object:
        column, title = AXES[self.axis.value]
        shown = self.workspace.shown
        return figures.pareto(
            rows,
            quality=self.quality.value,
            nbytes=column,
            also=() if column == "tokens_per_s" else ("total_nbytes",),
            lower_is_better=self.quality.value != "top1",
            more_is_better=column == "tokens_per_s",
            in_mib=column != "tokens_per_s",
            title_of_x=title,
            selected=[r.number for r in self.workspace.records if r.row["pinned"] or r is shown],
            dark=self.workspace.dark,
        )

    def _offer_groups(self, records: Sequence[Record]) -> None:
        """What there is to choose; a new run shows what it can be compared with."""
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(_key(record), []).append(record)
        options = {f"{_named(runs[0])} ({len(runs)})": key for key, runs in groups.items()}
        newest = max((r.number for r in records), default=0)
        value = self.group.value
        if newest > self._latest:
            value = _key(records[-1])
        elif value not in groups:
            value = ALL
        self._latest = newest
        with self._quiet.setting():
            self.group.param.update(options={f"all ({len(records)})": ALL} | options, value=value)
        self.group.visible = len(groups) > 0

    def _chosen(self, event: Event) -> None:
        if not self._quiet:
            self.stale()

    def _tabulate(self, frame: pd.DataFrame, hidden: list[str]) -> None:
        dark = self.workspace.dark
        if self.table is None:
            self.table = _table(frame, hidden, dark)
            made = self.table
            made.on_click(lambda event: self._open(int(made.value["run"].iloc[event.row])))
            self._table_at.objects = [self.table]
            return
        if hidden != self.table.hidden_columns:
            self.table.hidden_columns = hidden
        fill(self.table, frame, dark=dark)

    def _clicked(self, event: Event) -> None:
        points = (event.new or {}).get("points") or [{}]
        if isinstance(number := points[0].get("customdata"), int | float):
            self._open(int(number))

    def _open(self, number: int) -> None:
        record = next((r for r in self.workspace.records if r.number == number), None)
        if record is not None:
            self.details.open(record)

    def _csv(self) -> io.StringIO:
        return csv_of(self.workspace.rows)


def _key(record: Record) -> str:
    return "\n".join(record.group)


def _named(record: Record) -> str:
    """A group for people."""
    question = record.row["question"] or "going on"
    return in_label(f"{record.row['prompt']} · {question} · {record.row['model']}")


def _comparable(records: Sequence[Record]) -> pd.DataFrame:
    """The runs of a front: measured, and none that goes on from another one's cache."""
    rows = pd.DataFrame([r.row for r in records if r.row["status"] == "done" and r.row["turn"] == 1])
    if rows.empty:
        return rows
    return rows.dropna(subset=["kl"]).assign(
        method=[method_names(str(name)) for name in rows.dropna(subset=["kl"]).recipe]
    )


def _table(frame: pd.DataFrame, hidden: list[str], dark: bool) -> pn.widgets.Tabulator:
    formats = dict.fromkeys(("kv_share", "score_share", "top1"), "0.0%")
    formats |= dict.fromkeys(("kv_mib", "weight_mib", "total_mib", "peak_mib", "host_mib"), "0.00")
    formats |= {"kl": "0.0000", "tokens_per_s": "0.0"}
    return table(
        frame, _COLUMNS, formats, dark=dark, right=("run",), hidden_columns=hidden, header_tooltips=dict(_MEANINGS)
    )


def _shown(records: Sequence[Record]) -> pd.DataFrame:
    """The columns of the table; a run that was not done says why in place of its answer."""
    rows = []
    for record in records:
        row = dict(record.row)
        for name in ("kv", "weight", "total", "peak", "kv_host"):
            nbytes = row[f"{name}_nbytes"]
            row["host_mib" if name == "kv_host" else f"{name}_mib"] = None if nbytes is None else nbytes / MIB
        row["mark"] = "◆" if row["pinned"] else "↳" if row["turn"] > 1 else ""
        row["recipe"] = record.label
        row["right"] = _verdict(row["correct"], row["full_correct"])
        row["text"] = row["text"] if row["error"] is None else row["error"]
        rows.append(row)
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    numbers = [name for name in _COLUMNS if name.endswith(("_mib", "_share")) or name in ("kl", "top1")]
    return frame.astype(dict.fromkeys([*numbers, "tokens_per_s"], float))


def _verdict(correct: bool | None, full_correct: bool | None) -> str:
    """Whether an answer is right; of one that is wrong, whether the uncompressed model's is too."""
    if correct is None:
        return ""
    return "right" if correct else "wrong" if full_correct else "both wrong"


def _hidden(records: Sequence[Record]) -> list[str]:
    """The columns that say nothing yet: what is the same in all rows of a group, scores computed where no run has an
    attention method, bytes in host memory where no run has any, verdicts where no answer is expected.
    """
    rows = [record.row for record in records]
    said = {
        "host_mib": any(row["kv_host_nbytes"] for row in rows),
        "score_share": any(row["attention"] for row in rows),
        "right": any(row["correct"] is not None for row in rows),
    }
    hidden = [name for name in _SELDOM if not said[name]] + (["top1"] if said["right"] else [])
    titles = {"model": "model", "prompt_hash": "prompt", "question": "question"}
    return hidden + [titles[name] for name in GROUP if len({row[name] for row in rows}) == 1]
