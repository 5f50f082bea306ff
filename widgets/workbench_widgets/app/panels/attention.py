"""The attention of one head and what its tokens receive, all heads beside it; under a recipe, or as a difference, or
what another operator would make of the same queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.attention.operators import Operator
from workbench.errors import WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import find, registered
from workbench_widgets import figures, present
from workbench_widgets.app.elements.method_form import Menu, MethodForm
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.elements.theme import NOTE_STYLE
from workbench_widgets.app.panels.cached_maps import CachedMaps, grid_key, grid_of
from workbench_widgets.app.panels.map_subject import MapSubject, cost_of_entry, read_under, remark
from workbench_widgets.app.panels.panel import UNFINISHED, Panel, hint
from workbench_widgets.app.parts.stage_row import StageRow
from workbench_widgets.app.work.lru_cache import LRUCache
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_label, in_markup
from workbench_widgets.views import Heatmap, MapGrid, TokenText

_SURVEY = "Show all heads"
_OF_MODEL = "Attention of the model"
_OPERATORS = ("operator", "against")  # what stands before an operator's key in a choice
_REMEMBERED = 24  # maps and surveys; the largest is 1 MiB
_AT_ONCE = 1.5e9  # score entries of all heads that are surveyed unasked: some ten seconds on one CPU core

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from workbench.trace import Trace


class _Map(NamedTuple):
    """What is shown of one head: keywords of the map and of the text, the line of what tokens receive, a remark."""

    map: dict[str, object]
    text: dict[str, object]
    line: go.Figure
    remark: str


class AttentionPanel(Panel):
    """The map of one head, the attention that its tokens receive, and the maps of all heads."""

    title = "Attention"
    needs = ("reading", "plan", "selected", "run")

    def __init__(self, workspace: Workspace) -> None:
        slim: dict[str, object] = {"size": "small", "margin": (8, 12, 4, 8)}
        self.layer = pmu.IntSlider(label="Layer", start=0, end=1, value=0, width=200, **slim)
        self.head = pmu.IntSlider(label="Query head", start=0, end=1, value=0, width=160, **slim)
        self.shows = Menu(
            label="Shows",
            groups={_OF_MODEL: {"all keys": "full"}},
            value="full",
            sizing_mode="stretch_width",
            styles={"flex": "1 1 360px", "min-width": "0"},
            **slim,
        )
        self.pooling = pmu.Select(
            label="Cell shows", options={"largest": "max", "mean": "mean", "sum": "sum"}, width=102, **slim
        )
        self.scale = pmu.Select(label="Colours", options=["log", "linear", "percentile"], width=112, **slim)
        self.map: Any = Heatmap.panel(margin=0)
        self.line = pn.pane.Plotly(
            None, config={"displaylogo": False, "displayModeBar": False}, sizing_mode="stretch_width", height=190
        )
        self.text = TokenText.panel(rows=8, margin=0)
        self.grid: Any = MapGrid.panel(margin=0)
        self.survey = pmu.Button(label=_SURVEY, icon="grid_view", size="small", variant="outlined", margin=4)
        self._bar = pmu.LinearProgress(value=0, variant="determinate", sizing_mode="stretch_width", visible=False)
        self._hint = hint("The map comes when a prompt has been read.")
        self.doing = StageRow(workspace, "looking_stage", workspace.looking.cancel)
        self._remark = pn.pane.HTML(
            "", stylesheets=[NOTE_STYLE], sizing_mode="stretch_width", margin=(0, 8, 6, 8), visible=False
        )
        self.form: MethodForm | None = None  # of the operator that is chosen
        self._values: dict[str, dict[str, object]] = {}  # of operators chosen before
        self._parameters = pn.FlexBox(align_items="center", sizing_mode="stretch_width", visible=False, margin=0)
        row: dict[str, object] = {"align_items": "center", "sizing_mode": "stretch_width", "margin": 0}
        self._controls = pn.Column(
            pn.FlexBox(self.shows, self.pooling, self.scale, flex_wrap="nowrap", **row),
            self._parameters,
            pn.FlexBox(self.layer, self.head, **row),
            sizing_mode="stretch_width",
            margin=0,
        )
        for widget in (self.layer, self.head):
            widget.param.watch(self._slide, "value")
        self.shows.param.watch(self._subject_changed, "value")
        for choice in (self.pooling, self.scale):
            choice.param.watch(lambda _: self._changed(), "value")
        Heatmap.watch(self.map, "window", lambda _: self._changed())
        MapGrid.watch(self.grid, "selected", self._choose)
        self.survey.on_click(lambda _: self._survey(self.subject, asked=True))
        workspace.param.watch(self._show_progress, "survey_stage")
        one_head = pn.Column(
            self.map,
            self.line,
            self.text,
            sizing_mode="stretch_width",
            styles={"flex": "1 1 430px", "min-width": "0"},
            margin=0,
        )
        all_heads = pn.Column(
            self.survey,
            self._bar,
            self.grid,
            sizing_mode="stretch_width",
            styles={"flex": "0 1 370px", "min-width": "300px"},
            margin=0,
        )
        self._views = pn.FlexBox(one_head, all_heads, sizing_mode="stretch_width", gap="12px 24px", margin=0)
        self.body = pn.Column(
            self._hint,
            self._controls,
            self._remark,
            self.doing.body,
            self._views,
            sizing_mode="stretch_width",
            margin=(6, 0),
        )
        self._controls.visible = self._views.visible = False
        self._trace: Trace | None = None
        self._cache = LRUCache(_REMEMBERED)
        self._map_key: Hashable = None  # what the map shows or will show
        self._grid_key: Hashable = None  # what the grid shows or will show
        self._quiet = Quiet()
        super().__init__(workspace)

    # -- what a person does

    def _slide(self, event: Event) -> None:
        if not self._quiet:
            numbers = (0,) if self._trace is None else self._trace.numbers
            self.workspace.selected = (present.nearest(self.layer.value, numbers), self.head.value)

    def _changed(self) -> None:
        if not self._quiet:
            self.stale()

    def _subject_changed(self, event: Event) -> None:
        """An operator brings its controls, as it was left when it was chosen last."""
        kind, _, key = self.shows.value.partition(":")
        key = key if kind in _OPERATORS else ""
        if self.form is not None:
            self._values[self.form.cls.key] = self.form.values
        if key != ("" if self.form is None else self.form.cls.key):
            self.form = MethodForm(find(key), self._changed, self._values.get(key)) if key else None
            widgets = [] if self.form is None else self.form.controls
            for widget in widgets:
                widget.param.update(sizing_mode="fixed", width=150, margin=(8, 4, 4, 8))
            self._parameters.objects = widgets
            self._parameters.visible = bool(widgets)
        self._changed()

    def _choose(self, cell: tuple[int, int] | None) -> None:
        if not self._quiet and cell is not None:
            self.workspace.selected = (int(cell[0]), int(cell[1]))

    # -- what is shown

    def refresh(self) -> None:
        workspace = self.workspace
        reading = workspace.reading
        if reading is None:
            return
        self._hint.object = "<p>The map is being computed …</p>"  # until it is there
        with self._quiet.setting():  # controls that follow do not lead
            facts, numbers = reading.session.facts, reading.trace.numbers
            layer, head = workspace.selected or (numbers[0], 0)
            self.layer.param.update(start=numbers[0], end=numbers[-1], value=layer)
            self.head.param.update(end=facts.heads - 1, value=head)
            if reading.trace is not self._trace:
                self._trace = reading.trace
                self._cache = LRUCache(_REMEMBERED)
                self.map.param.update(window=None, selected=None)
                self._map_key = self._grid_key = None
            self._offer()
            if self.grid.selected != (layer, head):
                self.grid.selected = (layer, head)
        try:
            subject = self.subject
        except WorkbenchError as error:
            self._remark.param.update(object=f"<div>{in_markup(str(error))}</div>", visible=True)
            return
        self._show_map(layer, head, subject)
        self._survey(subject)

    @property
    def choices(self) -> dict[str, str]:
        """What can be shown: name -> value of `shows`, all groups together."""
        return {name: value for group in self.shows.groups.values() for name, value in group.items()}

    def _offer(self) -> None:
        """The choices of what to show: they follow the recipe and the runs so far."""
        workspace = self.workspace
        groups = {_OF_MODEL: {"all keys": "full"}}
        if workspace.plan is not None and workspace.recipe is not None:
            name = in_label(workspace.recipe.label)
            verb = "attention under" if read_under(workspace.recipe) else "keys kept by"
            groups[_OF_MODEL][f"{verb} {name}"] = "recipe"
            groups["Difference"] = {f"{name} − all keys": "difference"}
            groups["Difference"] |= {f"{name} − run of {in_label(label)}": f"run:{label}" for label in self._runs()}
        operators = registered("operator")
        groups["Implied by an operator"] = {in_label(cls.title): f"operator:{cls.key}" for cls in operators}
        groups["Difference of an operator"] = {
            f"{in_label(cls.title)} − all keys": f"against:{cls.key}" for cls in operators
        }
        if groups != self.shows.groups:
            offered = [value for group in groups.values() for value in group.values()]
            value = self.shows.value if self.shows.value in offered else "full"
            self.shows.param.update(groups=groups, value=value)

    def _runs(self) -> dict[str, Recipe]:
        """Recipes of the session's runs, by label, the latest first; not the full cache, which is always offered."""
        reading = self.workspace.reading
        runs = [] if reading is None else reading.session.runs
        return {run.recipe.label: run.recipe for run in reversed(runs) if run.recipe != Recipe.of("full")}

    @property
    def subject(self) -> MapSubject:
        """What is chosen. Raises BadParameter where an operator's parameters contradict each other."""
        recipe = self.workspace.recipe if self.workspace.plan is not None else None
        value = self.shows.value
        if self.form is not None:
            operator = self.form.method()
            assert isinstance(operator, Operator)
            return MapSubject(None, difference=value.startswith("against:"), operator=operator)
        if recipe is None or value == "full":
            return MapSubject(None)
        if value == "recipe":
            return MapSubject(recipe)
        base = self._runs().get(value.removeprefix("run:")) if value.startswith("run:") else None
        return MapSubject(recipe, base, difference=True)

    def _show_map(self, layer: int, head: int, subject: MapSubject) -> None:
        workspace, reading, operator = self.workspace, self.workspace.reading, subject.operator
        if reading is None:
            return
        session, tokens, cache = reading.session, reading.tokens, self._cache
        window, pooling, scale, dark = self.map.window, self.pooling.value, self.scale.value, workspace.dark
        key = (layer, head, subject, window, pooling, scale, dark)
        if key == self._map_key:
            return
        self._map_key = key
        rows, cols = (None, None) if window is None else (window[:2], window[2:])
        maps = CachedMaps(session, cache, layer, head, pooling=pooling, rows=rows, cols=cols)

        def work(progress: Progress) -> _Map:
            pooled = maps.of(subject, progress)
            if operator is None:
                note = remark(subject.recipe)
            else:
                errors = present.operator_line(maps.operator_errors(operator, progress), head)
                note = f"{errors} Received attention and the heads beside are the model's own."
            keywords = present.attention_map(
                pooled, tokens, layer=layer, head=head, scale=scale, of=subject.name, difference=subject.difference
            )
            # A difference has no colours of its own in the text: what the recipe's tokens receive says it as well.
            of = "" if subject.recipe is None else f"under {subject.recipe.label}"
            received = maps.received(subject.recipe, progress).numpy()
            text = present.received_text(received, tokens, layer=layer, head=head, of=of)
            return _Map(keywords, text, figures.received_line(received, tokens, dark=dark, title=""), note)

        def show(content: _Map) -> None:
            self._hint.visible, self._controls.visible, self._views.visible = False, True, True
            self._remark.param.update(object=f"<div>{in_markup(content.remark)}</div>", visible=bool(content.remark))
            Heatmap.update(self.map, **content.map, dark=dark)
            TokenText.update(self.text, **content.text, dark=dark)
            self.line.object = content.line

        def missed() -> None:
            self._map_key = None

        def given_up() -> None:
            self._map_key = None
            self._stale = True
            self._hint.object = f"<p>{UNFINISHED}</p>"

        workspace.look(work, self.in_view(show, missed), given_up)

    # -- all heads

    def _survey(self, subject: MapSubject, *, asked: bool = False) -> None:
        workspace, reading = self.workspace, self.workspace.reading
        if reading is None:
            return
        if subject.operator is not None:  # the heads beside it are those of the model
            subject = MapSubject(None)
        session, facts, cache = reading.session, reading.session.facts, self._cache
        MapGrid.update(self.grid, dark=workspace.dark)
        key = (self._trace, subject)
        if key == self._grid_key:
            return
        entries = (
            len(reading.trace.layers) * facts.heads * reading.trace.tokens**2 * sum(map(cost_of_entry, subject.recipes))
        )
        known = all(grid_key(recipe) in cache for recipe in subject.recipes)
        if not (asked or known or entries <= _AT_ONCE):
            self.survey.visible, self.grid.visible = True, False
            return
        self.survey.visible = not known
        self._grid_key = key

        def work(progress: Progress) -> dict[str, object]:
            grid, heads = grid_of(session, cache, subject.recipe, progress)
            if subject.difference:
                grid = grid.minus(grid_of(session, cache, subject.base, progress)[0])
            return present.map_grid(grid, heads, of=subject.name, difference=subject.difference)

        def show(keywords: dict[str, object]) -> None:
            self.grid.visible, self.survey.visible = True, False
            MapGrid.update(self.grid, **keywords)

        def given_up() -> None:
            self._grid_key = None
            self.survey.visible = True

        workspace.survey(work, self.in_view(show, given_up), given_up)

    def _show_progress(self, event: Event | None = None) -> None:
        """How far the survey is, on its own button."""
        stage, share = self.workspace.survey_stage
        self._bar.visible = bool(stage)
        self._bar.value = round(100 * (share or 0))
        self.survey.param.update(label=in_label(f"{stage} …") if stage else _SURVEY, disabled=bool(stage))
