"""Which recipes are run side by side: methods of the cache, weights and attention crossed, and recipes added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.errors import WorkbenchError
from workbench.recipe import Recipe
from workbench.registry import registered
from workbench_widgets.app.elements.method_form import method_title
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.app.state.recipe_slots import CACHE_SLOTS, kv_methods
from workbench_widgets.plain_text import in_label

PLAIN = ""  # no method of a family
_FIRST = ("full", "snapkv", "streaming-llm", "kivi")

Compare = Callable[[Sequence[Recipe], Sequence[str], Sequence[Recipe]], None]


class CompareForm:
    """`compare(recipes, budgets, as_they_are)` is called with the recipes that are crossed with the budgets, and those
    that were added, which have their own; `on_screen()` gives the page's recipe, None where it has none.
    """

    def __init__(self, compare: Compare, on_screen: Callable[[], Recipe | None]) -> None:
        self._compare, self._on_screen = compare, on_screen
        self._added: dict[str, Recipe] = {}
        kv = {method_title(cls): cls.key for slot in CACHE_SLOTS if slot != "allocate" for cls in kv_methods(slot)}
        wide: dict[str, object] = {"sizing_mode": "stretch_width", "min_width": 220, "margin": (8, 12, 8, 4)}
        self.methods = pmu.MultiChoice(
            label="Methods", options=kv, value=[key for key in _FIRST if key in kv.values()], **wide
        )
        self.weights = pmu.MultiChoice(
            label="Weights", options=_family("weights", "As they are"), value=[PLAIN], **wide
        )
        self.attention = pmu.MultiChoice(
            label="Attention", options=_family("attention", "Exact"), value=[PLAIN], **wide
        )
        self.budgets = TextField(
            label="Budgets",
            value="50%, 25%, 10%",
            description="Separated by commas: shares (25%), sizes (8MiB) or positions a head (512 tokens).",
            size="small",
            width=190,
            margin=(8, 12, 8, 0),
        )
        self.added = pmu.MultiChoice(label="Recipes of this page", options={}, value=[], visible=False, **wide)
        self.add = pmu.Button(
            label="Add the recipe above",
            icon="add",
            variant="outlined",
            size="small",
            margin=(8, 12, 8, 4),
        )
        self.start = pmu.Button(
            label="Compare", icon="compare_arrows", variant="outlined", width=140, margin=(8, 12, 8, 0)
        )
        self.count = pn.pane.HTML("", margin=(12, 4), stylesheets=["div { font-size: 12px; opacity: .75; }"])
        self.add.on_click(self._add)
        self.start.on_click(self._go)
        for widget in (self.methods, self.weights, self.attention, self.budgets, self.added):
            widget.param.watch(self._say, "value")
        self.body = pn.Column(
            pn.Row(self.methods, self.weights, self.attention, sizing_mode="stretch_width", margin=0),
            self.added,
            pn.FlexBox(
                self.budgets, self.start, self.add, self.count, align_items="center", sizing_mode="stretch_width"
            ),
            sizing_mode="stretch_width",
            margin=0,
        )
        self._say()

    def enable(self, on: bool) -> None:
        """Off while something else is computed, and before a prompt was read."""
        self.start.disabled = not on

    def chosen(self) -> tuple[list[Recipe], list[str], list[Recipe]]:
        """Recipes to be crossed with budgets, the budgets as text, and recipes as they are. Raises BadRecipe."""
        crossed = [
            Recipe.of([key for key in keys if key != PLAIN])
            for keys in product(
                self.methods.value or [], self.weights.value or [PLAIN], self.attention.value or [PLAIN]
            )
        ]
        return crossed, _split(self.budgets.value), [self._added[label] for label in self.added.value or []]

    def _add(self, event: Event) -> None:
        recipe = self._on_screen()
        if recipe is None:
            return
        label = in_label(recipe.label)
        self._added[label] = recipe
        self.added.param.update(options={name: name for name in self._added}, visible=True)
        self.added.value = [*dict.fromkeys([*(self.added.value or []), label])]

    def _go(self, event: Event) -> None:
        try:
            chosen = self.chosen()
        except WorkbenchError:
            self._say()  # why there is nothing to run
        else:
            self._compare(*chosen)

    def _say(self, *events: Event) -> None:
        """How many runs it would be."""
        try:
            recipes, budgets, added = self.chosen()
        except WorkbenchError as error:
            self.count.object = f"<div>{in_label(str(error))}</div>"
            return
        number = sum(max(len(budgets), 1) if recipe.takes_budget() else 1 for recipe in recipes) + len(added)
        self.count.object = f"<div>{number:,} runs</div>"


def _family(family: str, plain: str) -> dict[str, str]:
    return {plain: PLAIN} | {method_title(cls): cls.key for cls in registered(family)}


def _split(budgets: str) -> list[str]:
    return [part.strip() for part in budgets.replace(";", ",").split(",") if part.strip()]
