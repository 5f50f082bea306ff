"""The attention of a prompt in a notebook: all heads, the map of one, and what its tokens receive, linked."""

from __future__ import annotations

from typing import Any

import ipywidgets

from workbench.measure.attention import PooledMap
from workbench.recipe import Recipe
from workbench.session import Session
from workbench_widgets import present
from workbench_widgets.heatmap import Heatmap
from workbench_widgets.map_grid import MapGrid
from workbench_widgets.token_text import TokenText

_PIXELS = 512


class AttentionView(ipywidgets.VBox):  # type: ignore[misc]
    """What a session's prompt attends to: `AttentionView(session, layer=8, head=2)`.

    recipe: show what is left under it (default: all keys). minus: show the difference to this recipe instead; "full"
    is all keys. heads: whether to show all layers and heads too, a click on one of which chooses it; over n tokens
    that takes as long as layers x heads maps. A part of the map that is dragged over is computed anew, token by token
    where it is small enough.
    """

    def __init__(
        self,
        session: Session,
        layer: int = 0,
        head: int = 0,
        recipe: Any = None,
        *,
        minus: Any = None,
        heads: bool = True,
    ) -> None:
        self._session = session
        self._recipe = None if recipe is None else Recipe.of(recipe)
        self._minus = None if minus is None else Recipe.of(minus)
        trace = session.trace
        self._tokens = [] if trace is None else present.pieces(session.tokenizer, trace.ids)
        self._at = (layer, head)
        self.scale = ipywidgets.Dropdown(options=["log", "linear", "percentile"], description="Colours")
        self.pooling = ipywidgets.Dropdown(options=["max", "mean", "sum"], description="Cell shows")
        self.map = Heatmap.jupyter(**self._map())
        self.text = TokenText.jupyter(**self._text(), rows=8)
        for choice in (self.scale, self.pooling):
            choice.observe(lambda change: self._redraw(), names="value")
        Heatmap.watch(self.map, "window", lambda window: self._redraw())
        one = ipywidgets.VBox(
            [ipywidgets.HBox([self.scale, self.pooling]), self.map, self.text],
            layout=ipywidgets.Layout(flex="1 1 430px", min_width="0"),
        )
        parts: list[Any] = [one]
        self.grid = MapGrid.jupyter(**self._all(), selected=self._at) if heads else None
        if self.grid is not None:
            MapGrid.watch(self.grid, "selected", self._choose)
            parts.append(ipywidgets.Box([self.grid], layout=ipywidgets.Layout(flex="0 1 370px", min_width="300px")))
        row = ipywidgets.Layout(display="flex", flex_flow="row wrap", grid_gap="12px")
        super().__init__([ipywidgets.Box(parts, layout=row)])

    def __repr__(self) -> str:
        layer, head = self._at
        return f"AttentionView(layer={layer}, head={head}{', ' + self._of if self._of else ''})"

    @property
    def selected(self) -> tuple[int, int]:
        """The layer and query head in view; assign another pair to show it."""
        return self._at

    @selected.setter
    def selected(self, cell: tuple[int, int]) -> None:
        self._at = (int(cell[0]), int(cell[1]))
        if self.grid is not None:
            self.grid.selected = self._at
        self._redraw()
        TokenText.update(self.text, **self._text())

    @property
    def _of(self) -> str:
        name = "all keys" if self._recipe is None else self._recipe.label
        if self._minus is not None:
            return f"{name} − {'all keys' if self._minus == Recipe.of('full') else self._minus.label}"
        return "" if self._recipe is None else f"under {name}"

    def _choose(self, cell: tuple[int, int] | None) -> None:
        if cell is not None and cell != self._at:
            self.selected = cell

    def _redraw(self) -> None:
        Heatmap.update(self.map, **self._map(self.map.window))

    def _map(self, window: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
        layer, head = self._at
        spans: dict[str, Any] = {} if window is None else {"rows": tuple(window[:2]), "cols": tuple(window[2:])}

        def one(recipe: Recipe | None) -> PooledMap:
            return self._session.attention(layer, head, recipe, pixels=_PIXELS, pooling=self.pooling.value, **spans)

        found = one(self._recipe)
        if self._minus is not None:
            found = found.minus(one(self._minus))
        return present.attention_map(
            found,
            self._tokens,
            layer=layer,
            head=head,
            scale=self.scale.value,
            of=self._of,
            difference=self._minus is not None,
        )

    def _text(self) -> dict[str, Any]:
        layer, head = self._at
        of = "" if self._recipe is None else f"under {self._recipe.label}"
        received = self._session.received(layer, head, self._recipe)
        return present.received_text(received.numpy(), self._tokens, layer=layer, head=head, of=of)

    def _all(self) -> dict[str, Any]:
        grid = self._session.attention_grid(self._recipe, pixels=32)
        if self._minus is not None:
            grid = grid.minus(self._session.attention_grid(self._minus, pixels=32))
        heads = self._session.heads(self._recipe)
        return present.map_grid(grid, heads, of=self._of, difference=self._minus is not None)
