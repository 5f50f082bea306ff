"""The attention of one head and what its tokens receive, all heads beside it; under a recipe, or as a difference, or
what another operator would make of the same queries, keys and values.
"""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

import panel as pn
import panel_material_ui as pmu

from workbench.attention.base import AttentionMethod
from workbench.attention.operators import Study
from workbench.capture import changes_reading, has_to_run
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.registry import registered
from workbench_widgets import Heatmap, MapGrid, TokenText, figures, present
from workbench_widgets.app.look import restyle
from workbench_widgets.app.panels.panel import Panel, hint
from workbench_widgets.app.recent import Recent
from workbench_widgets.app.workspace import Workspace

_PIXELS = 512
_SMALL = 32  # pixels of a map in the grid
_SURVEY = "Show all heads"
_REMEMBERED = 24  # maps and surveys; the largest is 1 MiB
_AT_ONCE = 1.5e9  # score entries of all heads that are surveyed unasked: some ten seconds on one CPU core
_RUNNING = 10  # how much longer an entry takes where an attention method has to run for it, over 1,000 to 2,000 tokens


class Shown(NamedTuple):
    """Whose attention is shown: of `recipe` (None: all keys), where `difference` less that of `base`.

    operator: the key of one, whose implied attention is shown instead.
    """

    recipe: Recipe | None
    base: Recipe | None = None
    difference: bool = False
    operator: str = ""

    @property
    def name(self) -> str:
        if self.operator:
            return f"implied by {self.operator}" + (" − all keys" if self.difference else "")
        first = "all keys" if self.recipe is None else self.recipe.label
        base = "all keys" if self.base is None else self.base.label
        return f"{first} − {base}" if self.difference else "" if self.recipe is None else f"under {first}"


class AttentionPanel(Panel):
    title = "Attention"
    needs = ("reading", "plan", "selected", "run")

    def __init__(self, workspace: Workspace) -> None:
        slim: dict[str, Any] = {"size": "small", "margin": (8, 12, 4, 8)}
        self.layer = pmu.IntSlider(label="Layer", start=0, end=1, value=0, width=165, **slim)
        self.head = pmu.IntSlider(label="Query head", start=0, end=1, value=0, width=130, **slim)
        self.shows = pmu.Select(label="Shows", options={"all keys": "full"}, value="full", width=230, **slim)
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
        self._remark = pn.pane.HTML(
            "", stylesheets=[restyle("div")], sizing_mode="stretch_width", margin=(0, 8, 6, 8), visible=False
        )
        self._controls = pn.FlexBox(
            self.layer,
            self.head,
            self.shows,
            self.pooling,
            self.scale,
            align_items="center",
            sizing_mode="stretch_width",
        )
        for widget in (self.layer, self.head):
            widget.param.watch(self._slide, "value")
        for choice in (self.shows, self.pooling, self.scale):
            choice.param.watch(lambda event: self._changed(), "value")
        Heatmap.watch(self.map, "window", lambda window: self._changed())
        MapGrid.watch(self.grid, "selected", self._choose)
        self.survey.on_click(lambda event: self._survey(asked=True))
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
            self._hint, self._controls, self._remark, self._views, sizing_mode="stretch_width", margin=(6, 0)
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
        self._show_map(layer, head)
        self._survey()

    def _offer(self) -> None:
        """The choices of what to show: they follow the recipe and the runs so far."""
        workspace = self.workspace
        options = {"all keys": "full"}
        if workspace.plan is not None and workspace.recipe is not None:
            name = workspace.recipe.label
            kept = "attention under" if _sees_as_read(workspace.recipe) else "keys kept by"
            options |= {f"{kept} {name}": "recipe", f"difference: {name} − all keys": "difference"}
            options |= {f"difference: {name} − run of {label}": f"run:{label}" for label in self._runs()}
        operators = registered("operator")
        options |= {f"operator: {cls.title}": f"operator:{cls.key}" for cls in operators}
        options |= {f"difference: {cls.title} − all keys": f"against:{cls.key}" for cls in operators}
        if options != self.shows.options:
            value = self.shows.value if self.shows.value in options.values() else "full"
            self.shows.param.update(options=options, value=value)

    def _runs(self) -> dict[str, Recipe]:
        """Recipes of the session's runs, by label, the latest first; not the full cache, which is always offered."""
        runs = self.workspace.reading.session.runs
        return {run.recipe.label: run.recipe for run in reversed(runs) if run.recipe != Recipe.of("full")}

    @property
    def shown(self) -> Shown:
        """What is chosen."""
        recipe = self.workspace.recipe if self.workspace.plan is not None else None
        value = self.shows.value
        kind, _, key = value.partition(":")
        if kind in ("operator", "against"):
            return Shown(None, difference=kind == "against", operator=key)
        if recipe is None or value == "full":
            return Shown(None)
        if value == "recipe":
            return Shown(recipe)
        base = self._runs().get(value.removeprefix("run:")) if value.startswith("run:") else None
        return Shown(recipe, base, difference=True)

    def _show_map(self, layer: int, head: int) -> None:
        workspace, shown = self.workspace, self.shown
        session, tokens, memory = workspace.reading.session, workspace.reading.tokens, self._memory
        window, pooling, scale, dark = self.map.window, self.pooling.value, self.scale.value, workspace.dark
        wanted = (layer, head, shown, window, pooling, scale, dark)
        if wanted == self._asked:
            return
        self._asked = wanted
        spans = {} if window is None else {"rows": tuple(window[:2]), "cols": tuple(window[2:])}

        def study(heads: tuple[int, ...] | None, progress: Progress, **view: Any) -> Any:
            return session.operator(shown.operator, layer, head, heads=heads, progress=progress, **view)

        def work(progress: Progress) -> tuple[dict[str, Any], dict[str, Any], Any, str]:
            def implied() -> Any:
                made = memory.once(
                    ("operator", layer, head, shown.operator, window, pooling),
                    lambda: study((), progress, pixels=_PIXELS, pooling=pooling, **spans),
                )
                return made.implied.minus(made.exact) if shown.difference else made.implied

            def one(recipe: Recipe | None) -> Any:
                return memory.once(
                    ("map", layer, head, recipe, window, pooling),
                    lambda: session.attention(
                        layer, head, recipe, pixels=_PIXELS, pooling=pooling, progress=progress, **spans
                    ),
                )

            said = _remark(shown.recipe)
            if shown.operator:
                found = implied()
                errors = memory.once(("errors", layer, shown.operator), lambda: study(None, progress, pixels=1))
                said = _errors(errors, head)
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
            self._remark.param.update(object=f"<div>{escape(said)}</div>", visible=bool(said))
            Heatmap.update(self.map, **keywords, dark=dark)
            TokenText.update(self.text, **text, dark=dark)
            self.line.object = line

        def missed() -> None:
            self._asked = None

        workspace.look(work, self.in_view(show, missed))

    # -- all heads

    def _survey(self, *, asked: bool = False) -> None:
        workspace, shown = self.workspace, self.shown
        if shown.operator:  # the heads beside it are those of the model
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
        self.survey.param.update(label=f"{stage} …" if stage else _SURVEY, disabled=bool(stage))


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


def _errors(study: Study, head: int) -> str:
    """How far an operator's output is from the model's own, beside its implied map."""
    alone, scaled = float(study.error[head]), float(study.scaled_error[head])
    return (
        f"{study.operator.title}, on what this layer recorded: the output of head {head} is off by {alone:.0%} of its "
        f"norm, by {scaled:.0%} after the best factor; on average over the layer's {len(study.heads)} heads by "
        f"{float(study.error.mean()):.0%} and {float(study.scaled_error.mean()):.0%}. Received attention and the heads "
        "beside are the model's own."
    )
