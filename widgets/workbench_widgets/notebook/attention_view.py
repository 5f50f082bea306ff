"""The attention of a prompt in a notebook: all heads, the map of one, and what its tokens receive, linked."""

from __future__ import annotations

import ipywidgets

from workbench.attention.operators import Operator
from workbench.errors import BadParameter
from workbench.measure.attention import PooledMap
from workbench.recipe import Recipe
from workbench.registry import find, registered
from workbench.session import Session, Spec
from workbench_widgets import present
from workbench_widgets.notebook.method_controls import NONE, MethodControls
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.plain_text import in_markup
from workbench_widgets.views.heatmap import Heatmap
from workbench_widgets.views.map_grid import MapGrid
from workbench_widgets.views.token_text import TokenText

_PIXELS = 512


class AttentionView(Pictured):
    """What a session's prompt attends to: `AttentionView(session, layer=8, head=2)`; by default the first layer's.

    recipe: show what is left under it (default: all keys). minus: show the difference to this recipe instead; "full"
    is all keys. operator: in place of a recipe, the map that this attention operator implies, a key of
    `wb.methods("operator")` or an operator with parameters; another one, and its parameters, can be chosen below the
    heads. heads: whether to show all layers and heads too, a click on one of which chooses it; over n tokens that takes
    as long as layers x heads maps. A part of the map that is dragged over is computed anew, token by token where it is
    small enough. Raises NotRead before a prompt was read, BadParameter for an operator beside a recipe.
    """

    def __init__(
        self,
        session: Session,
        layer: int | None = None,
        head: int = 0,
        recipe: Spec | None = None,
        *,
        minus: Spec | None = None,
        operator: Operator | str | None = None,
        heads: bool = True,
    ) -> None:
        self._session = session
        self._recipe = None if recipe is None else Recipe.of(recipe)
        self._minus = None if minus is None else Recipe.of(minus)
        chosen = find(operator)() if isinstance(operator, str) else operator
        if chosen is not None:
            if not isinstance(chosen, Operator):
                raise BadParameter(f"{chosen.key} is no attention operator: choose one of wb.methods('operator')")
            if recipe is not None or self._minus not in (None, Recipe.of("full")):
                raise BadParameter('an operator is shown alone or, with minus="full", less exact attention: no recipe')
            self._minus = None  # is its own affair
        trace = session.trace
        self._tokens = [] if trace is None else present.prompt_pieces(trace.prompt)
        first = 0 if trace is None else trace.numbers[0]
        self._selected = (first if layer is None else layer, head)
        self.scale = ipywidgets.Dropdown(options=["log", "linear", "percentile"], description="Colours")
        self.pooling = ipywidgets.Dropdown(options=["max", "mean", "sum"], description="Cell shows")
        self.operator = MethodControls(
            "Implied by an operator",
            registered("operator"),
            NONE if chosen is None else chosen.key,
            self._operator_changed,
            optional=True,
            values=None if chosen is None else dict(chosen),
        )
        self.operator.layout.width = "auto"
        self.against = ipywidgets.Checkbox(
            value=chosen is not None and minus is not None, description="less exact attention", indent=False
        )
        self.remark = ipywidgets.HTML()
        self.map = Heatmap.jupyter(**self._map())
        self._remark_on_operator()
        self.text = TokenText.jupyter(**self._text(), rows=8)
        for choice in (self.scale, self.pooling):
            choice.observe(lambda _: self._redraw(), names="value")
        self.against.observe(lambda _: self._operator_changed(), names="value")
        Heatmap.watch(self.map, "window", lambda _: self._redraw())
        one_head = ipywidgets.VBox(
            [ipywidgets.HBox([self.scale, self.pooling]), self.remark, self.map, self.text],
            layout=ipywidgets.Layout(flex="1 1 430px", min_width="0"),
        )
        self.grid = MapGrid.jupyter(**self._all(), selected=self._selected) if heads else None
        if self.grid is not None:
            MapGrid.watch(self.grid, "selected", self._choose)
        beside = ipywidgets.VBox(
            [*([] if self.grid is None else [self.grid]), self.operator, self.against],
            layout=ipywidgets.Layout(flex="0 1 370px" if heads else "0 1 220px", min_width="200px"),
        )
        row = ipywidgets.Layout(display="flex", flex_flow="row wrap", grid_gap="12px")
        super().__init__([ipywidgets.Box([one_head, beside], layout=row)])

    def __repr__(self) -> str:
        layer, head = self._selected
        return f"AttentionView(layer={layer}, head={head}{', ' + self._subject if self._subject else ''})"

    @property
    def selected(self) -> tuple[int, int]:
        """The layer and query head in view; assign another pair to show it."""
        return self._selected

    @selected.setter
    def selected(self, cell: tuple[int, int]) -> None:
        self._selected = (int(cell[0]), int(cell[1]))
        if self.grid is not None:
            self.grid.selected = self._selected
        self._redraw()
        self._remark_on_operator()
        TokenText.update(self.text, **self._text())

    @property
    def _operator(self) -> Operator | None:
        method = self.operator.method()
        assert method is None or isinstance(method, Operator)
        return method

    @property
    def _subject(self) -> str:
        """What the map is of, beside layer and head."""
        operator = self._operator
        return self._heads_subject if operator is None else present.implied_by(operator, difference=self.against.value)

    @property
    def _heads_subject(self) -> str:
        """What the heads are of."""
        name = "all keys" if self._recipe is None else self._recipe.label
        if self._minus is not None:
            return f"{name} − {'all keys' if self._minus == Recipe.of('full') else self._minus.label}"
        return "" if self._recipe is None else f"under {name}"

    def _choose(self, cell: tuple[int, int] | None) -> None:
        if cell is not None and cell != self._selected:
            self.selected = cell

    def _operator_changed(self) -> None:
        self._redraw()
        self._remark_on_operator()

    def _remark_on_operator(self) -> None:
        """How far the operator's output is from the model's own."""
        operator, (layer, head) = self._operator, self._selected
        line = ""
        if operator is not None:
            line = present.operator_line(self._session.operator(operator, layer, head, pixels=1), head)
        self.against.layout.display = "none" if operator is None else ""
        self.remark.value = f'<div style="line-height:1.4">{in_markup(line)}</div>' if line else ""

    def _redraw(self) -> None:
        Heatmap.update(self.map, **self._map(self.map.window))

    def _map(self, window: tuple[int, int, int, int] | None = None) -> dict[str, object]:
        layer, head = self._selected
        rows, cols = (None, None) if window is None else (window[:2], window[2:])
        pooling = self.pooling.value

        def attention(recipe: Recipe | None) -> PooledMap:
            return self._session.attention(layer, head, recipe, pixels=_PIXELS, pooling=pooling, rows=rows, cols=cols)

        operator = self._operator
        if operator is not None:
            difference = bool(self.against.value)
            study = self._session.operator(
                operator, layer, head, heads=(), pixels=_PIXELS, pooling=pooling, rows=rows, cols=cols
            )
            pooled = study.implied.minus(study.exact) if difference else study.implied
        else:
            difference, pooled = self._minus is not None, attention(self._recipe)
            if self._minus is not None:
                pooled = pooled.minus(attention(self._minus))
        return present.attention_map(
            pooled,
            self._tokens,
            layer=layer,
            head=head,
            scale=self.scale.value,
            of=self._subject,
            difference=difference,
        )

    def _text(self) -> dict[str, object]:
        layer, head = self._selected
        of = "" if self._recipe is None else f"under {self._recipe.label}"
        received = self._session.received(layer, head, self._recipe)
        return present.received_text(received.numpy(), self._tokens, layer=layer, head=head, of=of)

    def _all(self) -> dict[str, object]:
        grid = self._session.attention_grid(self._recipe, pixels=32)
        if self._minus is not None:
            grid = grid.minus(self._session.attention_grid(self._minus, pixels=32))
        heads = self._session.heads(self._recipe)
        return present.map_grid(grid, heads, of=self._heads_subject, difference=self._minus is not None)
