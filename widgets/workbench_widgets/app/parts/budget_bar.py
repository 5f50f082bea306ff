"""The budgets of the cache and of the weights; below them what the recipe saves."""

from __future__ import annotations

from collections.abc import Callable

import panel_material_ui as pmu
from param.parameterized import Event

from workbench.registry import Method
from workbench.weights.base import WeightMethod
from workbench_widgets import present
from workbench_widgets.app.elements.budget_slider import BudgetSlider
from workbench_widgets.app.elements.figures_row import figures_row, show
from workbench_widgets.app.elements.notice import Notice
from workbench_widgets.app.work.workspace import Workspace

_CACHE = "A share of the uncompressed cache (25%), a size (8MiB) or a number of positions a head (512 tokens)."
_WEIGHTS = (
    "A share of the 16-bit bytes of the weights that the method is for (30%), or a size for them (40MiB); what it "
    "cannot compress there counts."
)
_EMPTY = "The numbers come when the prompt has been read."
_REFUSED = "There are no numbers for these settings."
_PLANNING = "The numbers come when the recipe has been planned."


class BudgetBar:
    """`value` and `weights` are the budgets as text; `changed()` and `weights_changed()` are called on every move.

    weights: empty for a weight method's own budget; there is a slider only for methods whose size can be chosen.
    """

    def __init__(
        self,
        workspace: Workspace,
        value: str,
        weights: str,
        changed: Callable[[], None],
        weights_changed: Callable[[], None],
    ) -> None:
        self._workspace = workspace
        self.cache = BudgetSlider("Budget (% of the uncompressed cache)", "Exactly", _CACHE, value, changed)
        self.of_weights = BudgetSlider(
            "Weights (% of the bytes of what is compressed, at 16 bits)",
            "As a size",
            _WEIGHTS,
            weights,
            weights_changed,
        )
        self.of_weights.body.visible = False
        self._method: type[Method] | None = None
        self.figures = figures_row(_EMPTY)
        self.refusal = Notice(severity="warning", margin=(6, 0), css_classes=["wb-refusal"])
        workspace.param.watch(self._show, ["plan", "reading"])
        workspace.param.watch(self._refuse, "refusal")
        workspace.param.watch(self._show, "refusal")
        self.body = pmu.Paper(
            self.cache.body,
            self.of_weights.body,
            self.refusal,
            self.figures,
            variant="outlined",
            elevation=0,
            sizing_mode="stretch_width",
            margin=(0, 0, 12, 0),
            sx={"padding": "8px 16px"},
        )

    @property
    def value(self) -> str:
        return self.cache.value

    @property
    def weights(self) -> str:
        return self.of_weights.value if self.of_weights.body.visible else ""

    def enable(self, on: bool) -> None:
        """Off for a recipe that compresses nothing of the cache."""
        self.cache.slider.disabled = self.cache.exact.disabled = not on

    def offer(self, method: type[Method] | None) -> None:
        """Which weight method the recipe has: its own budget is where the slider begins."""
        if method is self._method:
            return
        before, self._method = self._method, method
        sized = method is not None and issubclass(method, WeightMethod) and method.takes_budget()
        if sized and method is not None:
            kept = self.of_weights.value if before is None else ""  # that of a link, for the method that it names
            self.of_weights.set(kept, round(100 * (method.default_budget or 1)))
        self.of_weights.body.visible = sized

    def show(self, value: str, weights: str) -> None:
        """Other budgets, without telling anybody. weights: empty for the weight method's own."""
        self.cache.set(value)
        if self.of_weights.body.visible and self._method is not None:
            self.of_weights.set(weights, round(100 * (self._method.default_budget or 1)))

    def _show(self, *events: Event) -> None:
        if self._workspace.refusal:  # what was planned before has nothing to do with the settings above
            show(self.figures, [], _REFUSED)
            return
        plan, reading, weights = self._workspace.plan, self._workspace.reading, self._workspace.weights
        if plan is not None and reading is not None and weights is not None:
            show(self.figures, [*present.plan_figures(plan), present.weights_figure(*weights)])
        else:
            show(self.figures, [], _EMPTY if reading is None else _PLANNING)

    def _refuse(self, event: Event) -> None:
        self.refusal.say(event.new)
