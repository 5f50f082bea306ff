"""All runs so far as a table, as a file, and as what each byte buys; and many at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import MappingProxyType

import pandas as pd
import panel as pn
import panel_material_ui as pmu

from workbench_widgets import figures, present
from workbench_widgets.app.elements.method_form import method_title
from workbench_widgets.app.elements.table import csv_of, fill, table
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.state.recipe_slots import CACHE_SLOTS, kv_methods
from workbench_widgets.app.work.workspace import Workspace

_COLUMNS = MappingProxyType(
    {  # column -> title, width; the file has all there is
        "run": ("#", 40),
        "recipe": ("Recipe", 150),
        "kv_share": ("Share", 72),
        "kv_mib": ("KV MiB", 80),
        "host_mib": ("Host MiB", 86),
        "score_share": ("Scores", 72),
        "kl": ("KL", 70),
        "top1": ("Top-1", 72),
        "nll_difference": ("NLL diff.", 86),
        "perplexity": ("Perplexity", 104),
        "tokens_per_s": ("Tokens/s", 92),
        "text": ("Answer", 0),
    }
)
_MEANINGS = MappingProxyType(
    {  # column -> what its title says when it is pointed at
        "kv_share": "Bytes of the cache, of the uncompressed one's",
        "score_share": "Attention score entries computed while the prompt was read, of all causal ones",
        "top1": "Positions at which the most likely token is that of the uncompressed run",
    }
)


class RunsPanel(Panel):
    """`compare(recipes, budgets)` is called with method keys and budgets as text."""

    title = "Runs"
    needs = ("rows", "working", "reading")

    def __init__(self, workspace: Workspace, compare: Callable[[list[str], list[str]], None]) -> None:
        every = {method_title(cls): cls.key for slot in CACHE_SLOTS if slot != "allocate" for cls in kv_methods(slot)}
        self.methods = pmu.MultiChoice(
            label="Methods",
            options=every,
            value=[key for key in ("full", "snapkv", "streaming-llm", "kivi") if key in every.values()],
            sizing_mode="stretch_width",
            min_width=300,
            margin=(8, 12, 8, 4),
        )
        self.budgets = TextField(
            label="Budgets",
            value="50%, 25%, 10%",
            description="Separated by commas: shares (25%), sizes (8MiB) or positions a head (512 tokens).",
            size="small",
            width=190,
            margin=(8, 12, 8, 0),
        )
        self.start = pmu.Button(
            label="Compare", icon="compare_arrows", variant="outlined", width=140, margin=(8, 12, 8, 0)
        )
        self.start.on_click(
            lambda _: compare([str(key) for key in self.methods.value or ()], _split(self.budgets.value))
        )
        self.download = pmu.FileDownload(
            callback=self._csv,
            filename="runs.csv",
            label="CSV",
            width=110,
            disabled=True,
            margin=(8, 0),
        )
        self.quality = pmu.Select(
            label="Quality",
            options={title: name for name, title in figures.QUALITIES.items()},
            size="small",
            width=190,
            margin=(8, 4),
            visible=False,
        )
        self.quality.param.watch(lambda _: self.stale(), "value")
        self.table: pn.widgets.Tabulator | None = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0)
        self.figure = pn.pane.Plotly(
            None, config={"displaylogo": False}, sizing_mode="stretch_width", height=420, visible=False
        )
        self._hint = hint(
            "No runs yet. Press <b>Run</b> above, or compare several methods here; every run becomes a row."
        )
        self.body = pn.Column(
            pn.Row(self.methods, self.budgets, self.start, self.download, sizing_mode="stretch_width", margin=0),
            self._hint,
            self._table_at,
            self.quality,
            self.figure,
            sizing_mode="stretch_width",
            margin=(6, 0),
        )
        super().__init__(workspace)

    def refresh(self) -> None:
        workspace = self.workspace
        rows = workspace.rows
        self.start.disabled = workspace.working or workspace.reading is None
        self.download.disabled = rows.empty
        self._hint.visible = rows.empty
        if rows.empty:
            return
        self._tabulate(_shown(rows), _hidden(rows))
        measured = rows.dropna(subset=["kl"]) if "kl" in rows else rows.iloc[:0]
        self.quality.visible = self.figure.visible = not measured.empty
        if not measured.empty:
            better = self.quality.value != "top1"
            self.figure.object = figures.pareto(
                present.pareto(measured), quality=self.quality.value, lower_is_better=better, dark=workspace.dark
            )

    def _tabulate(self, frame: pd.DataFrame, hidden: list[str]) -> None:
        dark = self.workspace.dark
        if self.table is None:
            self.table = _table(frame, hidden, dark)
            self._table_at.objects = [self.table]
            return
        if hidden != self.table.hidden_columns:
            self.table.hidden_columns = hidden
        fill(self.table, frame, dark=dark)

    def _csv(self) -> io.StringIO:
        return csv_of(self.workspace.rows)


def _table(frame: pd.DataFrame, hidden: list[str], dark: bool) -> pn.widgets.Tabulator:
    formats = dict.fromkeys(("kv_share", "score_share", "top1"), "0.0%")
    formats |= {
        "kv_mib": "0.00",
        "host_mib": "0.00",
        "kl": "0.0000",
        "nll_difference": "+0.0000",
        "perplexity": "0.000",
        "tokens_per_s": "0.0",
    }
    return table(
        frame, _COLUMNS, formats, dark=dark, right=("run",), hidden_columns=hidden, header_tooltips=dict(_MEANINGS)
    )


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table; a run that was not done says why in place of its answer."""
    shown = rows.reindex(columns=list(_COLUMNS))
    if "error" in rows:
        shown["text"] = shown["text"].where(rows["error"].isna(), rows["error"])
    return shown


def _hidden(rows: pd.DataFrame) -> list[str]:
    """The columns that say nothing yet: scores computed where no run has an attention method, bytes in host memory
    where no run has any.
    """
    reads = "attention" in rows and bool(rows["attention"].notna().any())
    hosts = "host_mib" in rows and bool((rows["host_mib"].fillna(0) > 0).any())
    return [*([] if hosts else ["host_mib"]), *([] if reads else ["score_share"])]


def _split(budgets: str) -> list[str]:
    return [part.strip() for part in budgets.replace(";", ",").split(",") if part.strip()]
