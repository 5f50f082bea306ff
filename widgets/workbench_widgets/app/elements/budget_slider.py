"""A budget as a slider in percent and a field that takes any budget; each follows the other."""

from __future__ import annotations

from collections.abc import Callable

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.budget import Budget
from workbench.errors import BadBudget
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.elements.text_field import TextField


class BudgetSlider:
    """`value` is the budget as text; `changed()` is called on every move. label, exact_label: of slider and field."""

    def __init__(
        self,
        label: str,
        exact_label: str,
        description: str,
        value: str,
        changed: Callable[[], None],
        *,
        start: int = 25,
    ) -> None:
        self.value = value
        self._changed = changed
        self._quiet = Quiet()
        self.slider = pmu.IntSlider(
            label=label,
            start=1,
            end=100,
            value=_percent(value) or start,
            sizing_mode="stretch_width",
            margin=(4, 16, 0, 8),
            min_width=260,
            show_value=False,
        )
        self.exact = TextField(
            label=exact_label, value=value, description=description, size="small", width=170, margin=(8, 4, 0, 4)
        )
        self.slider.param.watch(self._moved, "value")
        self.exact.param.watch(self._typed, "value")
        self.body = pn.Row(self.slider, self.exact, sizing_mode="stretch_width", margin=0)

    def set(self, value: str, start: int | None = None) -> None:
        """Show another budget without telling anybody; where it has no percentage the slider goes to `start`."""
        self.value = value
        self.exact.placeholder = "" if start is None else f"{start}%"
        self._quietly(self.exact, value)
        self._quietly(self.slider, _percent(value) or start or self.slider.value)

    def _moved(self, event: Event) -> None:
        if self._quiet:
            return
        self.value = f"{event.new}%"
        self._quietly(self.exact, self.value)
        self._changed()

    def _typed(self, event: Event) -> None:
        if self._quiet:
            return
        self.value = str(event.new).strip()
        percent = _percent(self.value)
        if percent is not None:
            self._quietly(self.slider, percent)
        self._changed()

    def _quietly(self, widget: pmu.IntSlider | TextField, value: int | str) -> None:
        with self._quiet.setting():
            widget.value = value


def _percent(text: str) -> int | None:
    try:
        budget = Budget.parse(text)
    except BadBudget:
        return None
    return max(1, round(budget.amount * 100)) if budget.kind == "share" else None
