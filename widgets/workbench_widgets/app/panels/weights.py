"""What a recipe's weight method does to each weight, and what the model's weights are like."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import panel as pn
import panel_material_ui as pmu

from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.weights.surgery.linears import linear_layers
from workbench_widgets import Heatmap, weight_views
from workbench_widgets.app.doing import Doing
from workbench_widgets.app.figures_row import figures_row, show
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.panels.weight_sections import SECTIONS, Asked, Look, census_of, sensitivity_key
from workbench_widgets.app.recent import Recent
from workbench_widgets.app.table import fill, table
from workbench_widgets.app.workspace import Workspace
from workbench_widgets.plain_text import in_label, in_markup

_REMEMBERED = 24  # tables; the largest, of outliers, has some hundred thousand rows
_COLUMNS = {  # of the tables -> title, width
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
_FORMATS = {
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


class WeightsPanel(Panel):
    title = "Weights"
    needs = ("reading", "weights", "recipe")

    def __init__(self, workspace: Workspace) -> None:
        slim: dict[str, Any] = {"size": "small", "margin": (8, 12, 4, 8), "visible": False}
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
        self.doing = Doing(workspace, "weighing_stage", workspace.weighing.cancel)
        self.download = pmu.FileDownload(
            callback=self._csv,
            filename="weights.csv",
            label="CSV",
            width=110,
            margin=(8, 4),
            visible=False,
        )
        self._hint = hint("The weights can be looked at when a prompt has been read.")
        self.numbers = figures_row()
        self.map: Any = Heatmap.panel(brush=False, margin=(8, 0), visible=False)
        self.figures = [
            pn.pane.Plotly(None, config={"displaylogo": False}, sizing_mode="stretch_width", height=340, visible=False)
            for _ in range(2)
        ]
        self.table: Any = None
        self._table_at = pn.Column(sizing_mode="stretch_width", margin=0, visible=False)
        self._frame = pd.DataFrame()
        self._memory, self._session = Recent(_REMEMBERED), None
        self._quiet = False
        self._of = ""  # the section that is shown
        self._wanted = False  # whether what is only measured when it is asked for was asked for
        choices = (self.section, self.measure, self.kind, self.each, self.layer, self.module)
        for widget in choices:
            what = "value_throttled" if widget is self.layer else "value"
            widget.param.watch(self._chosen, what)
        self.start.on_click(self._ask)
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

    def _chosen(self, event: Any) -> None:
        self._wanted = False
        if not self._quiet:
            self.stale()

    def _ask(self, event: Any) -> None:
        self._wanted = True
        self.stale()

    def _select(self, cell: tuple[int, int] | None) -> None:
        """A click on a cell: its singular values, where one wants to see what became of it."""
        if self._quiet or cell is None or self.section.value not in ("layers", "sensitivity"):
            return
        options = list(self.module.options.values())
        if int(cell[1]) < len(options):
            self._quiet = True
            try:
                self.layer.value, self.module.value = int(cell[0]), options[int(cell[1])]
            finally:
                self._quiet = False
            self.section.value = "spectra"

    def _offer(self) -> None:
        """The layers and modules of the model, once for each session."""
        session = self.workspace.reading.session
        if session is self._session:
            return
        self._session, self._memory = session, Recent(_REMEMBERED)
        names = list(decoder_layers(session.model))
        inside = [placed(name, names) for name in linear_layers(session.model)]
        modules = list(dict.fromkeys(module for layer, module in inside if layer is not None))
        self._quiet = True
        try:
            self.layer.param.update(end=max(len(names) - 1, 1), value=min(self.layer.value, len(names) - 1))
            kept = self.module.value if self.module.value in modules else next(iter(modules), None)
            self.module.param.update(options={in_label(name): name for name in modules}, value=kept)
        finally:
            self._quiet = False

    # -- what is shown

    def refresh(self) -> None:
        workspace, section = self.workspace, SECTIONS[self.section.value]
        if workspace.reading is None:
            return
        self._offer()
        methods = () if workspace.weights is None else workspace.weights.methods
        recipe = Recipe.of(list(methods)) if methods else None
        empty = recipe is None and section.needs_recipe
        for name in ("measure", "kind", "each", "layer", "module"):
            getattr(self, name).visible = name in section.choices and not empty
        self.module.visible = self.module.visible and not (section.title == "Outliers" and self.kind.value != "weights")
        asked = Asked(
            workspace.reading.session,
            recipe,
            self._memory,
            int(self.layer.value),
            str(self.module.value),
            str(self.measure.value),
            str(self.kind.value),
            str(self.each.value),
            workspace.dark,
        )
        button, about = section.asks_first
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
        if button and not self._wanted and sensitivity_key(asked) not in self._memory:
            self.start.param.update(label=button, visible=True)
            workspace.stop_weighing()
            self._nothing(about)
            return

        if self.section.value != self._of:  # what another section showed would be mistaken for this
            self._show(Look(said="This is being computed …"), [])

        def work(progress: Progress) -> tuple[Look, list[str]]:
            look = section.make(asked, progress)
            offered = weight_views.chosen(census_of(asked, progress)) if section.title == "Layers" else []
            return look, offered

        def shown(found: tuple[Look, list[str]]) -> None:
            self._wanted, self._of = False, title
            self._show(*found)

        def given_up() -> None:
            self._wanted = False
            self._stale = True
            self.start.param.update(label=button or "Show", visible=True)
            self._nothing("This was not finished.")

        workspace.weigh(work, self.in_view(shown), given_up, stage="Measuring" if self._wanted else "")

    def _nothing(self, said: str) -> None:
        self._of = ""
        self._show(Look(said=said), [])

    def _show(self, look: Look, offered: list[str]) -> None:
        dark = self.workspace.dark
        self._hint.object = f"<p>{in_markup(look.said)}</p>"
        self._hint.visible = bool(look.said)
        show(self.numbers, look.numbers)
        self.numbers.visible = bool(look.numbers)
        self._quiet = True
        try:
            if offered:
                options = {weight_views.MEASURES[name]: name for name in offered}
                kept = self.measure.value if self.measure.value in offered else offered[0]
                self.measure.param.update(options=options, value=kept)
            if look.map is not None:
                Heatmap.update(self.map, **look.map, selected=None, dark=dark)
        finally:
            self._quiet = False
        self.map.visible = look.map is not None
        for pane, figure in zip(self.figures, (*look.figures, None, None), strict=False):
            pane.visible = figure is not None
            if figure is not None:
                pane.object = figure
        self._tabulate(look.table, dark)

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
        text = io.StringIO()
        self._frame.to_csv(text, index=False)
        text.seek(0)
        return text
