"""A plan in a notebook: its bytes, its prompt and what it keeps, linked."""

from __future__ import annotations

import ipywidgets

from workbench.kv.plan import Plan
from workbench_widgets import present
from workbench_widgets.html_summaries import plan_html, plan_line
from workbench_widgets.notebook.pictured import Pictured
from workbench_widgets.views import KeptRaster, TokenText


class PlanView(Pictured):
    """A plan's bytes, prompt and kept positions; a clicked row of the raster shows how that head keeps the prompt, a
    clicked token is marked in the raster.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tokens = present.plan_tokens(plan)
        self.bytes = ipywidgets.HTML(plan_html(plan))
        self.text = TokenText.jupyter(**present.token_text(plan, self._tokens), rows=8)
        self.raster = KeptRaster.jupyter(**present.kept_raster(plan, self._tokens))
        TokenText.watch(self.text, "selected", self._mark)
        KeptRaster.watch(self.raster, "selected", self._choose)
        super().__init__([self.bytes, self.text, self.raster])

    def __repr__(self) -> str:
        return f"PlanView({self._plan.label!r})"

    @property
    def heading(self) -> str:
        return plan_line(self._plan)

    @property
    def plan(self) -> Plan:
        """The plan shown; assign another one to show it in the same place."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        if plan.trace is not self._plan.trace:
            self._tokens = present.plan_tokens(plan)
        self._plan = plan
        self.bytes.value = plan_html(plan)
        KeptRaster.update(self.raster, **present.kept_raster(plan, self._tokens))
        self._choose(self.raster.selected)

    def _choose(self, selected: tuple[int, int] | None) -> None:
        heads = self._plan.tiers.shape[1]
        inside = selected is not None and selected[0] in self._plan.trace.numbers and selected[1] < heads
        TokenText.update(self.text, **present.token_text(self._plan, self._tokens, selected if inside else None))

    def _mark(self, position: int | None) -> None:
        self.raster.marked = position
