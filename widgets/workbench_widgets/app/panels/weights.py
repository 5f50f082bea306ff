"""What a recipe's weight method does to each weight, and what the model's weights are like."""

from __future__ import annotations

import io
from dataclasses import replace
from types import MappingProxyType

import pandas as pd
import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.session import Session
from workbench.weights.surgery.linears import linear_layers
from workbench_widgets import weight_views
from workbench_widgets.app.elements.download import Download
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.elements.table import csv_of, fill, table
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.panels.weight_sections import (
    SECTIONS,
    SectionContent,
    WeightQuery,
    census_key,
    census_of,
    output_error_seconds,
    sensitivity_key,
)
from workbench_widgets.app.parts.stage_row import StageRow
from workbench_widgets.app.work.eta import in_words
from workbench_widgets.app.work.lru_cache import LRUCache
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_label, in_markup
from workbench_widgets.views import Heatmap

_UNASKED_S = 15  # what takes longer waits to be asked for
_REMEMBERED = 24  # tables; the largest, of outliers, has some hundred thousand rows
_COLUMNS = MappingProxyType(
    {  # of the tables -> title, width
        "name": ("Weight", 176),
        "layer": ("Layer", 70),
        "module": ("Module", 170),
        "form": ("Held as", 106),
        "bits": ("Bits", 62),
        "rank": ("Rank", 66),
        "density": ("Density", 82),
        "mib": ("MiB", 66),
        "share": ("Share", 70),
        "weight_error": ("Weight error", 122),
        "output_error": ("Output error", 122),
        "chosen": ("Chosen", 0),
        "kl": ("KL", 90),
        "error": ("Error", 0),
        "reason": ("Why it is left as it is", 0),
    }
)
_FORMATS = MappingProxyType(
    {
        "bits": "0.00",
        "rank": "0",
        "density": "0.0%",
        "mib": "0.00",
        "share": "0.0%",
        "weight_error": "0.00%",
        "output_error": "0.00%",
        "kl": "0.00000",
        "error": "0.00%",
    }
)


class WeightsPanel(Panel):
    """The sections of `weight_sections`, each with its choices; what takes long is measured when somebody asks."""

    title = "Weights"
    needs = ("reading", "weights", "recipe")

    def __init__(self, workspace: Workspace) -> None:
        slim: dict[str, object] = {"size": "small", "margin": (8, 12, 4, 8), "visible": False}
        self.section = pmu.RadioButtonGroup(
            label="",
            options={section.title: name for name, section in SECTIONS.items()},
            value="layers",
            size="small",
            margin=(8, 4),
        )
        self.measure = pmu.Select(
            label="Shows", options={title: name for name, title in weight_views.MEASURES.items()}, width=250, **slim
        )
        self.kind = pmu.Select(label="Outliers of", options=["weights", "activations"], width=150, **slim)
        self.each = pmu.Select(
            label="Parts",
            options={"layers, and kinds of modules": "layer", "every module": "module"},
            width=240,
            **slim,
        )
        self.layer = pmu.IntSlider(label="Layer", start=0, end=1, value=0, width=180, **slim)
        self.module = pmu.Select(label="Module", options={}, width=210, **slim)
        self.start = pmu.Button(
            label="", icon="insights", size="small", variant="outlined", margin=(8, 4), visible=False
        )
        self.doing = StageRow(workspace, "weighing_stage", workspace.weighing.cancel)
        self.download = Download(
            callback=self._csv,
            filename="weights.csv",
            label="CSV",
            width=110,
            margin=(8, 4),
            visible=False,
        )
        self._hint = hint("The weights can be looked at when a prompt has been read.")
        self.numbers = figures_row()
        self.map = Heatmap.panel(brush=False, margin=(8, 0), visible=False)
        self.figures = [
            pn.pane.Plotly(None, config={"displaylogo": False}, sizing_mode="stretch_width", height=340, visible=False)
            for _ in range(2)
        ]
        self.table: pn.widgets.Tabulator | None = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0, visible=False)
        self._frame = pd.DataFrame()
        self._cache = LRUCache(_REMEMBERED)
        self._session: Session | None = None
        self._quiet = Quiet()
        self._shown_section = ""  # the section that is shown
        self._measuring = False  # whether what is only measured when somebody asks was asked for
        choices = (self.section, self.measure, self.kind, self.each, self.layer, self.module)
        for widget in choices:
            what = "value_throttled" if widget is self.layer else "value"
            widget.param.watch(self._choice_changed, what)
        self.start.on_click(self._measure)
        Heatmap.watch(self.map, "selected", self._select)
        self.body = pn.Column(
            self.section,
            pn.FlexBox(
                self.measure,
                self.kind,
                self.each,
                self.layer,
                self.module,
                self.start,
                align_items="center",
                sizing_mode="stretch_width",
            ),
            self.doing.body,
            self._hint,
            self.numbers,
            self.map,
            *self.figures,
            self._table_at,
            self.download,
            sizing_mode="stretch_width",
            margin=(6, 0),
        )
        super().__init__(workspace)

    # -- what was chosen

    def _choice_changed(self, event: Event) -> None:
        self._measuring = False
        if not self._quiet:
            self.stale()

    def _measure(self, event: Event) -> None:
        self._measuring = True
        self.stale()

    def _select(self, cell: tuple[int, int] | None) -> None:
        """A click on a cell: its singular values, where one wants to see what became of it."""
        if self._quiet or cell is None or self.section.value not in ("layers", "sensitivity"):
            return
        options = list(self.module.options.values())
        if int(cell[1]) < len(options):
            with self._quiet.setting():
                self.layer.value, self.module.value = int(cell[0]), options[int(cell[1])]
            self.section.value = "spectra"

    def _offer(self, session: Session) -> None:
        """The layers and modules of the model, once for each session."""
        if session is self._session:
            return
        self._session, self._cache = session, LRUCache(_REMEMBERED)
        names = list(decoder_layers(session.model))
        inside = [placed(name, names) for name in linear_layers(session.model)]
        modules = list(dict.fromkeys(module for layer, module in inside if layer is not None))
        with self._quiet.setting():
            self.layer.param.update(end=max(len(names) - 1, 1), value=min(self.layer.value, len(names) - 1))
            module = self.module.value if self.module.value in modules else next(iter(modules), None)
            self.module.param.update(options={in_label(name): name for name in modules}, value=module)

    # -- what is shown

    def refresh(self) -> None:
        workspace, section = self.workspace, SECTIONS[self.section.value]
        if workspace.reading is None:
            return
        self._offer(workspace.reading.session)
        methods = () if workspace.weights is None else workspace.weights.methods
        recipe = Recipe.of(list(methods)) if methods else None
        empty = recipe is None and section.needs_recipe
        for name in ("measure", "kind", "each", "layer", "module"):
            getattr(self, name).visible = name in section.choices and not empty
        self.module.visible = self.module.visible and not (section.title == "Outliers" and self.kind.value != "weights")
        query = WeightQuery(
            workspace.reading.session,
            recipe,
            self._cache,
            int(self.layer.value),
            str(self.module.value),
            str(self.measure.value),
            self.kind.value,
            self.each.value,
            workspace.dark,
        )
        button, about = section.asks_first
        takes = output_error_seconds(query.session) if section.title == "Layers" else 0.0
        if takes > _UNASKED_S and not self._measuring:
            query = replace(query, outputs=False)
        title = str(self.section.value)
        self.start.visible = False
        if empty:
            coming = workspace.recipe is not None and workspace.recipe.family("weights")
            workspace.stop_weighing()
            self._nothing(
                "This comes when the weights are compressed."
                if coming
                else "Choose a weight method in the recipe to see what it does to every weight."
            )
            return
        if button and not self._measuring and sensitivity_key(query) not in self._cache:
            self.start.param.update(label=button, visible=True)
            workspace.stop_weighing()
            self._nothing(about)
            return

        if not query.outputs and census_key(query) not in self._cache:
            left = in_words(takes).removesuffix(" left")
            self.start.param.update(label=f"Measure output errors ({left} on two cores)", visible=True)

        if self.section.value != self._shown_section:  # what another section showed would be mistaken for this
            self._show(SectionContent(remark="This is being computed …"), [])

        def work(progress: Progress) -> tuple[SectionContent, list[str]]:
            content = section.make(query, progress)
            offered = weight_views.chosen(census_of(query, progress)) if section.title == "Layers" else []
            return content, offered

        def show_section(outcome: tuple[SectionContent, list[str]]) -> None:
            self._measuring, self._shown_section = False, title
            self._show(*outcome)

        def given_up() -> None:
            self._measuring = False
            self._stale = True
            self.start.param.update(label=button or "Show", visible=True)
            self._nothing("This was not finished.")

        workspace.weigh(work, self.in_view(show_section), given_up, stage="Measuring" if self._measuring else "")

    def _nothing(self, remark: str) -> None:
        self._shown_section = ""
        self._show(SectionContent(remark=remark), [])

    def _show(self, content: SectionContent, offered: list[str]) -> None:
        dark = self.workspace.dark
        self._hint.object = f"<p>{in_markup(content.remark)}</p>"
        self._hint.visible = bool(content.remark)
        show(self.numbers, content.numbers)
        self.numbers.visible = bool(content.numbers)
        with self._quiet.setting():
            if offered:
                options = {weight_views.MEASURES[name]: name for name in offered}
                measure = self.measure.value if self.measure.value in offered else offered[0]
                self.measure.param.update(options=options, value=measure)
            if content.map is not None:
                Heatmap.update(self.map, **content.map, selected=None, dark=dark)
        self.map.visible = content.map is not None
        for pane, figure in zip(self.figures, (*content.figures, None, None), strict=False):
            pane.visible = figure is not None
            if figure is not None:
                pane.object = figure
        self._tabulate(content.table, dark)

    def _tabulate(self, frame: pd.DataFrame | None, dark: bool) -> None:
        self._table_at.visible = self.download.visible = frame is not None
        if frame is None:
            return
        self._frame = frame
        if self.table is not None and list(self.table.value.columns) == list(frame.columns):
            fill(self.table, frame, dark=dark)
            return
        columns = {name: _COLUMNS[name] for name in frame.columns}
        self.table = table(frame, columns, {n: f for n, f in _FORMATS.items() if n in columns}, dark=dark)
        self._table_at.objects = [self.table]

    def _csv(self) -> io.StringIO:
        return csv_of(self._frame)
