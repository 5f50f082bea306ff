"""Choosing a recipe: KV methods by what they contribute, weights and attention, each with its own controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from urllib.parse import quote

import panel as pn
import panel_material_ui as pmu
from param.parameterized import Event

from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.recipe import Recipe
from workbench.registry import Method
from workbench_widgets.app.elements.method_form import MethodForm, method_title
from workbench_widgets.app.elements.quiet import Quiet
from workbench_widgets.app.state.recipe_slots import CACHE_SLOTS, RECIPE_SLOTS, methods_for
from workbench_widgets.plain_text import in_markup

NONE = ""
_CHOICES = MappingProxyType(
    {  # slot -> label, what none means, help
        "kv": ("KV cache: which tokens stay", "", "The method that decides which positions each head keeps."),
        "refine": (
            "Its scores refined by",
            "Nothing",
            "A method that improves on the scores of the one above: by whole chunks, or by what values write.",
        ),
        "allocate": (
            "Share among layers and heads",
            "The method's own",
            "A method that divides the budget among layers and heads.",
        ),
        "store": ("Stored at", "The model's precision", "A method that packs what is kept into fewer bits."),
        "retrieve": (
            "All others in host memory",
            "Dropped",
            "A method that moves what is not kept to host memory and fetches what a query needs.",
        ),
        "select": (
            "Attended to by a new token",
            "All that is on the device",
            "A method that chooses by each query what it attends to. It saves reading, no memory.",
        ),
        "evict": (
            "Leaves while decoding",
            "What the method above lets leave",
            "A method that scores what is held anew as the answer grows, by the method above. The lowest leave.",
        ),
        "weights": (
            "Weights",
            "As they are",
            "A method that packs the model's weights. The prompt is read again with them.",
        ),
        "attention": ("Attention", "Exact", "How the prompt is read. The prompt is read again with it."),
    }
)


_SELECTING, _READING = "Chosen once the prompt is read", "Chosen while it is read, in bounded memory"


class SlotForm:
    """One place of a recipe: a choice of methods, and the chosen one's controls."""

    def __init__(
        self, slot: str, key: str, values: Mapping[str, Mapping[str, object]], changed: Callable[[], None]
    ) -> None:
        label, none, description = _CHOICES[slot]
        classes = methods_for(slot)
        self.classes = {cls.key: cls for cls in classes}
        options = {none: NONE} if none else {}
        options |= {method_title(cls): cls.key for cls in classes}
        choices = {"groups": _grouped(classes)} if slot == "kv" else {"options": options}
        self.select = pmu.Select(
            label=label,
            **choices,
            value=key if key in self.classes else next(iter(options.values())),
            description=description,
            size="small",
            sizing_mode="stretch_width",
            margin=(10, 4, 2, 4),
        )
        self.form: MethodForm | None = None
        self._values = {key: dict(parameters) for key, parameters in values.items()}
        self._options = list(options.values())
        self._quiet = Quiet()
        self._changed = changed
        self._about = pn.pane.HTML(
            "",
            sizing_mode="stretch_width",
            margin=(2, 6, 4, 6),
            stylesheets=["div { font-size: 12px; line-height: 1.4; opacity: .75; }"],
        )
        self._grid = pn.layout.GridBox(
            ncols=2, sizing_mode="stretch_width", styles={"grid-template-columns": "1fr 1fr"}
        )
        self._preset = pn.Column(sizing_mode="stretch_width", margin=0)  # the grid's cells are half as wide
        self.body = pn.Column(self.select, self._about, self._preset, self._grid, sizing_mode="stretch_width", margin=0)
        self.select.param.watch(self._choose, "value")
        self._build()

    @property
    def key(self) -> str:
        return str(self.select.value)

    def method(self) -> Method | None:
        """The chosen method with its parameters. Raises BadParameter."""
        return None if self.form is None else self.form.method()

    def show(self, key: str, values: Mapping[str, Mapping[str, object]]) -> None:
        """Another method with these parameters, without telling anybody."""
        wanted = {key: dict(values[key])} if key in values else {}
        if key == self.key and wanted == self.values():
            return  # controls that are made anew while others are would not be drawn
        self._values |= {name: dict(parameters) for name, parameters in values.items()}
        if key in self.classes and key not in values:
            self._values.pop(key, None)
        with self._quiet.setting():
            self.select.value = key if key in self.classes else next(iter(self._options), NONE)
        self._build()

    def values(self) -> dict[str, dict[str, object]]:
        """What differs from the defaults, by method."""
        return {self.key: self.form.values} if self.form is not None and self.form.values else {}

    def _choose(self, event: Event) -> None:
        if self._quiet:
            return
        if self.form is not None:
            self._values[self.form.cls.key] = self.form.values  # there again when it is chosen again
        self._build()
        self._changed()

    def _build(self) -> None:
        cls = self.classes.get(self.key)
        self.form = None if cls is None else MethodForm(cls, self._changed, self._values.get(cls.key))
        preset = None if self.form is None else self.form.preset
        self._preset.objects = [] if preset is None else [preset]
        self._preset.visible = preset is not None
        self._grid.objects = [] if self.form is None else list(self.form.widgets.values())
        self._grid.visible = bool(self._grid.objects)
        self._about.object = "" if cls is None else f"<div>{_description(cls)}</div>"
        self._about.visible = cls is not None


def _grouped(classes: list[type[Method]]) -> dict[str, dict[str, str]]:
    """Methods that select, and methods that read the prompt themselves, as title -> key."""
    groups: dict[str, dict[str, str]] = {_SELECTING: {}, _READING: {}}
    for cls in classes:
        reads = issubclass(cls, KVMethod) and cls.contributes("read")
        groups[_READING if reads else _SELECTING][method_title(cls)] = cls.key
    return {group: options for group, options in groups.items() if options}


def _description(cls: type[Method]) -> str:
    """What a method does and how true it is to its paper, as markup, with a link to that."""
    parts = [in_markup(f"{cls.summary()}.")]
    if cls.paper is not None:
        authors = in_markup(cls.paper.authors)
        link = f"https://arxiv.org/abs/{quote(cls.paper.arxiv)}" if cls.paper.arxiv else ""
        style = "color: inherit"
        parts += [f'<a href="{link}" target="_blank" rel="noopener" style="{style}">{authors}</a>' if link else authors]
    if cls.fidelity is not None and cls.fidelity.standing != "baseline":
        standing, how = in_markup(cls.fidelity.standing.capitalize()), in_markup(cls.fidelity.how)
        parts += [f"<br><b>{standing}</b>{f': {how}' if how else ''}."]
    return " ".join(parts)


class RecipeForm:
    """All places of a recipe. `changed()` is called when the recipe changes in any way but its budget."""

    def __init__(
        self, chosen: Mapping[str, str], values: Mapping[str, Mapping[str, object]], changed: Callable[[], None]
    ) -> None:
        self.slots = {slot: SlotForm(slot, chosen.get(slot, NONE), values, changed) for slot in RECIPE_SLOTS}
        self.body = pn.Column(*(slot.body for slot in self.slots.values()), sizing_mode="stretch_width", margin=0)

    @property
    def takes_budget(self) -> bool:
        """Whether the recipe compresses the cache at all."""
        forms = (self.slots[slot].form for slot in CACHE_SLOTS)
        return any(form is not None and form.cls.takes_budget() for form in forms)

    @property
    def weights(self) -> type[Method] | None:
        """The weight method that is chosen."""
        form = self.slots["weights"].form
        return None if form is None else form.cls

    def recipe(self, budget: str, weights_budget: str = "") -> Recipe:
        """The recipe as the controls describe it. Raises BadParameter, BadBudget or BadRecipe.

        weights_budget: of the weight method; empty for its own.
        """
        chosen = [method for slot in self.slots.values() if (method := slot.method()) is not None]
        if weights_budget:
            chosen = [m.with_budget(weights_budget) if m.family == "weights" else m for m in chosen]
        kv = [method for method in chosen if method.family == "kv"]
        if len(kv) > 1:  # another method of the cache takes the place of "full"
            chosen = [method for method in chosen if method.key != Full.key]
        return Recipe.of(chosen, **({"budget": budget} if self.takes_budget else {}))

    def show(self, chosen: Mapping[str, str], values: Mapping[str, Mapping[str, object]]) -> None:
        """Another recipe, without telling anybody. chosen: the keys of its methods by their places."""
        for slot, form in self.slots.items():
            form.show(chosen.get(slot, NONE), values)

    def keys(self) -> dict[str, str]:
        return {name: slot.key for name, slot in self.slots.items()}

    def values(self) -> dict[str, dict[str, object]]:
        return {key: values for slot in self.slots.values() for key, values in slot.values().items()}
