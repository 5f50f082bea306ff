"""The attention of one head and what its tokens receive, all heads beside it; under a recipe, or as a difference, or
what another operator would make of the same queries, keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import panel as pn
import panel_material_ui as pmu

from workbench.attention.base import AttentionMethod
from workbench.attention.operators import Operator, Study
from workbench.capture import changes_reading, has_to_run
from workbench.errors import WorkbenchError
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import find, registered
from workbench_widgets import figures, present
from workbench_widgets.app.elements.method_form import Menu, MethodForm
from workbench_widgets.app.elements.theme import restyle
from workbench_widgets.app.panels.panel import UNFINISHED, Panel, hint
from workbench_widgets.app.parts.stage_row import Doing
from workbench_widgets.app.work.lru_cache import Recent
from workbench_widgets.app.work.workspace import Workspace
from workbench_widgets.plain_text import in_label, in_markup
from workbench_widgets.views import Heatmap, MapGrid, TokenText

_PIXELS = 512
_SMALL = 32  # pixels of a map in the grid
_SURVEY = "Show all heads"
_OF_MODEL = "Attention of the model"
_OPERATORS = ("operator", "against")  # what stands before an operator's key in a choice
_REMEMBERED = 24  # maps and surveys; the largest is 1 MiB
_AT_ONCE = 1.5e9  # score entries of all heads that are surveyed unasked: some ten seconds on one CPU core
_RUNNING = 10  # how much longer an entry takes where an attention method has to run for it, over 1,000 to 2,000 tokens


class Shown(NamedTuple):
    """Whose attention is shown: of `recipe` (None: all keys), where `difference` less that of `base`.

    operator: one whose implied attention is shown instead.
    """

    recipe: Recipe | None
    base: Recipe | None = None
    difference: bool = False
    operator: Operator | None = None

    @property
    def name(self) -> str:
        if self.operator is not None:
            return present.implied_by(self.operator, difference=self.difference)
        first = "all keys" if self.recipe is None else self.recipe.label
        base = "all keys" if self.base is None else self.base.label
        return f"{first} − {base}" if self.difference else "" if self.recipe is None else f"under {first}"


class AttentionPanel(Panel):
    title = "Attention"
    needs = ("reading", "plan", "selected", "run")

    def __init__(self, workspace: Workspace) -> None:
        slim: dict[str, Any] = {"size": "small", "margin": (8, 12, 4, 8)}
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
        self.text: Any = TokenText.panel(rows=8, margin=0)
        self.grid: Any = MapGrid.panel(margin=0)
        self.survey = pmu.Button(label=_SURVEY, icon="grid_view", size="small", variant="outlined", margin=4)
        self._bar = pmu.LinearProgress(value=0, variant="determinate", sizing_mode="stretch_width", visible=False)
        self._hint = hint("The map comes when a prompt has been read.")
        self.doing = Doing(workspace, "looking_stage", workspace.looking.cancel)
        self._remark = pn.pane.HTML(
            "", stylesheets=[restyle("div")], sizing_mode="stretch_width", margin=(0, 8, 6, 8), visible=False
        )
        self.form: MethodForm | None = None  # of the operator that is chosen
        self._values: dict[str, dict[str, Any]] = {}  # of operators chosen before
        self._parameters = pn.FlexBox(align_items="center", sizing_mode="stretch_width", visible=False, margin=0)
        row: dict[str, Any] = {"align_items": "center", "sizing_mode": "stretch_width", "margin": 0}
        self._controls = pn.Column(
            pn.FlexBox(self.shows, self.pooling, self.scale, flex_wrap="nowrap", **row),
            self._parameters,
            pn.FlexBox(self.layer, self.head, **row),
            sizing_mode="stretch_width",
            margin=0,
        )
        for widget in (self.layer, self.head):
            widget.param.watch(self._slide, "value")
        self.shows.param.watch(self._choose_shown, "value")
        for choice in (self.pooling, self.scale):
            choice.param.watch(lambda event: self._changed(), "value")
        Heatmap.watch(self.map, "window", lambda window: self._changed())
        MapGrid.watch(self.grid, "selected", self._choose)
        self.survey.on_click(lambda event: self._survey(self.shown, asked=True))
        workspace.param.watch(self._tell, "survey_stage")
        one = pn.Column(
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
        self._views = pn.FlexBox(one, all_heads, sizing_mode="stretch_width", gap="12px 24px", margin=0)
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
        self._trace: Any = None
        self._memory = Recent(_REMEMBERED)
        self._asked: Any = None  # what the map shows or will show
        self._surveyed: Any = None  # what the grid shows or will show
        self._quiet = False
        super().__init__(workspace)

    # -- what a person does

    def _slide(self, event: Any) -> None:
        if not self._quiet:
            self.workspace.selected = (self.layer.value, self.head.value)

    def _changed(self) -> None:
        if not self._quiet:
            self.stale()

    def _choose_shown(self, event: Any) -> None:
        """An operator brings its controls, as it was left when it was chosen last."""
        kind, _, key = self.shows.value.partition(":")
        key = key if kind in _OPERATORS else ""
        if self.form is not None:
            self._values[self.form.cls.key] = self.form.values
        if key != ("" if self.form is None else self.form.cls.key):
            self.form = MethodForm(find(key), self._changed, self._values.get(key)) if key else None
            widgets = [] if self.form is None else list(self.form.widgets.values())
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
        self._quiet = True  # controls that follow do not lead
        try:
            layer, head = workspace.selected or (0, 0)
            facts = reading.session.facts
            self.layer.param.update(end=facts.layers - 1, value=layer)
            self.head.param.update(end=facts.heads - 1, value=head)
            if reading.trace is not self._trace:
                self._trace = reading.trace
                self._memory = Recent(_REMEMBERED)
                self.map.param.update(window=None, selected=None)
                self._asked = self._surveyed = None
            self._offer()
            if self.grid.selected != (layer, head):
                self.grid.selected = (layer, head)
        finally:
            self._quiet = False
        try:
            shown = self.shown
        except WorkbenchError as error:
            self._remark.param.update(object=f"<div>{in_markup(str(error))}</div>", visible=True)
            return
        self._show_map(layer, head, shown)
        self._survey(shown)

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
            kept = "attention under" if _sees_as_read(workspace.recipe) else "keys kept by"
            groups[_OF_MODEL][f"{kept} {name}"] = "recipe"
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
        runs = self.workspace.reading.session.runs
        return {run.recipe.label: run.recipe for run in reversed(runs) if run.recipe != Recipe.of("full")}

    @property
    def shown(self) -> Shown:
        """What is chosen. Raises BadParameter where an operator's parameters contradict each other."""
        recipe = self.workspace.recipe if self.workspace.plan is not None else None
        value = self.shows.value
        if self.form is not None:
            operator = self.form.method()
            assert isinstance(operator, Operator)
            return Shown(None, difference=value.startswith("against:"), operator=operator)
        if recipe is None or value == "full":
            return Shown(None)
        if value == "recipe":
            return Shown(recipe)
        base = self._runs().get(value.removeprefix("run:")) if value.startswith("run:") else None
        return Shown(recipe, base, difference=True)

    def _show_map(self, layer: int, head: int, shown: Shown) -> None:
        workspace, operator = self.workspace, shown.operator
        session, tokens, memory = workspace.reading.session, workspace.reading.tokens, self._memory
        window, pooling, scale, dark = self.map.window, self.pooling.value, self.scale.value, workspace.dark
        wanted = (layer, head, shown, window, pooling, scale, dark)
        if wanted == self._asked:
            return
        self._asked = wanted
        spans = {} if window is None else {"rows": tuple(window[:2]), "cols": tuple(window[2:])}

        def work(progress: Progress) -> tuple[dict[str, Any], dict[str, Any], Any, str]:
            def study(operator: Operator, key: Any, heads: tuple[int, ...] | None, **view: Any) -> Study:
                return memory.once(
                    (*key, layer, operator),
                    lambda: session.operator(operator, layer, head, heads=heads, progress=progress, **view),
                )

            def one(recipe: Recipe | None) -> Any:
                return memory.once(
                    ("map", layer, head, recipe, window, pooling),
                    lambda: session.attention(
                        layer, head, recipe, pixels=_PIXELS, pooling=pooling, progress=progress, **spans
                    ),
                )

            said = _remark(shown.recipe)
            if operator is not None:
                view: dict[str, Any] = {"pixels": _PIXELS, "pooling": pooling, **spans}
                made = study(operator, ("operator", head, window, pooling), (), **view)
                found = made.implied.minus(made.exact) if shown.difference else made.implied
                errors = study(operator, ("errors",), None, pixels=1)
                own = "Received attention and the heads beside are the model's own."
                said = f"{present.operator_line(errors, head)} {own}"
            else:
                found = one(shown.recipe).minus(one(shown.base)) if shown.difference else one(shown.recipe)
            keywords = present.attention_map(
                found, tokens, layer=layer, head=head, scale=scale, of=shown.name, difference=shown.difference
            )
            # A difference has no colours of its own in the text: what the recipe's tokens receive says it as well.
            of = "" if shown.recipe is None else f"under {shown.recipe.label}"
            received = memory.once(
                ("received", layer, head, shown.recipe),
                lambda: session.received(layer, head, shown.recipe, progress=progress),
            ).numpy()
            text = present.received_text(received, tokens, layer=layer, head=head, of=of)
            line = figures.received_line(received, tokens, dark=dark, title="")
            return keywords, text, line, said

        def show(made: tuple[dict[str, Any], dict[str, Any], Any, str]) -> None:
            keywords, text, line, said = made
            self._hint.visible, self._controls.visible, self._views.visible = False, True, True
            self._remark.param.update(object=f"<div>{in_markup(said)}</div>", visible=bool(said))
            Heatmap.update(self.map, **keywords, dark=dark)
            TokenText.update(self.text, **text, dark=dark)
            self.line.object = line

        def missed() -> None:
            self._asked = None

        def given_up() -> None:
            self._asked = None
            self._stale = True
            self._hint.object = f"<p>{UNFINISHED}</p>"

        workspace.look(work, self.in_view(show, missed), given_up)

    # -- all heads

    def _survey(self, shown: Shown, *, asked: bool = False) -> None:
        workspace = self.workspace
        if shown.operator is not None:  # the heads beside it are those of the model
            shown = Shown(None)
        session, facts, memory = workspace.reading.session, workspace.reading.session.facts, self._memory
        MapGrid.update(self.grid, dark=workspace.dark)
        wanted = (self._trace, shown)
        if wanted == self._surveyed:
            return
        entries = facts.layers * facts.heads * self._trace.tokens**2 * sum(map(_effort, self._needed(shown)))
        known = all(("grid", recipe) in memory for recipe in self._needed(shown))
        if not (asked or known or entries <= _AT_ONCE):
            self.survey.visible, self.grid.visible = True, False
            return
        self.survey.visible = not known
        self._surveyed = wanted

        def work(progress: Progress) -> dict[str, Any]:
            def one(recipe: Recipe | None) -> Any:
                return memory.once(
                    ("grid", recipe),
                    lambda: (
                        session.attention_grid(recipe, pixels=_SMALL, progress=progress),
                        session.heads(recipe, progress=progress),
                    ),
                )

            found, heads = one(shown.recipe)
            if shown.difference:
                found = found.minus(one(shown.base)[0])
            return present.map_grid(found, heads, of=shown.name, difference=shown.difference)

        def show(keywords: dict[str, Any]) -> None:
            self.grid.visible, self.survey.visible = True, False
            MapGrid.update(self.grid, **keywords)

        def given_up() -> None:
            self._surveyed = None
            self.survey.visible = True

        workspace.survey(work, self.in_view(show, given_up), given_up)

    def _needed(self, shown: Shown) -> list[Recipe | None]:
        return [shown.recipe, shown.base] if shown.difference else [shown.recipe]

    def _tell(self, event: Any = None) -> None:
        """How far the survey is, on its own button."""
        stage, share = self.workspace.survey_stage
        self._bar.visible = bool(stage)
        self._bar.value = round(100 * (share or 0))
        self.survey.param.update(label=in_label(f"{stage} …") if stage else _SURVEY, disabled=bool(stage))


def _sees_as_read(recipe: Recipe | None) -> bool:
    """Whether the attention of a recipe is what its attention method made while the prompt was read."""
    return recipe is not None and any(changes_reading(method) for method in _attention(recipe))


def _effort(recipe: Recipe | None) -> int:
    """How long a score entry takes under a recipe; exact attention: 1."""
    return _RUNNING if recipe is not None and any(has_to_run(method) for method in _attention(recipe)) else 1


def _attention(recipe: Recipe) -> list[AttentionMethod]:
    return [method for method in recipe.family("attention") if isinstance(method, AttentionMethod)]


def _remark(recipe: Recipe | None) -> str:
    """What has to be said beside an attention method's own map where KV methods stand beside it."""
    if recipe is None or not _sees_as_read(recipe):
        return ""
    kept = [method.key for method in recipe.family("kv") if method.key != "full"]
    if not kept:
        return ""
    reads = _attention(recipe)[0].key
    return (
        f"The prompt is read under {reads} before {' and '.join(kept)} {'drop' if len(kept) > 1 else 'drops'} or "
        f"rounds anything: these are the weights of {reads} alone."
    )
