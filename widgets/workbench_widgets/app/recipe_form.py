"""Choosing a recipe: KV methods by what they contribute, weights and attention, each with its own controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import panel as pn
import panel_material_ui as pmu

from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.recipe import Recipe
from workbench.registry import Method, registered
from workbench_widgets.app.controls import MethodForm
from workbench_widgets.plain_text import in_label, in_markup

NONE = ""
CACHE_SLOTS = ("kv", "allocate", "store", "retrieve")


def kv_methods(slot: str) -> list[type[Method]]:
    """The KV methods for one place: "kv" (which tokens stay), "allocate" (how many each head), "store", "retrieve"."""
    found: list[type[Method]] = []
    for cls in registered("kv"):
        assert issubclass(cls, KVMethod)
        fits = cls.contributes(slot)
        if slot == "kv":
            fits = cls.contributes("score") or not (cls.contributes("store") or cls.contributes("retrieve"))
        if fits:
            found.append(cls)
    return sorted(found, key=lambda cls: cls.key != Full.key)  # the uncompressed cache first


def methods_for(slot: str) -> list[type[Method]]:
    """The methods for one place of a recipe, of the cache or of another family."""
    return kv_methods(slot) if slot in CACHE_SLOTS else list(registered(slot))


SLOTS: dict[str, tuple[str, str, str]] = {  # slot -> label, what none means, help
    "kv": ("KV cache: which tokens stay", "", "The method that decides which positions each head keeps."),
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
    "weights": (
        "Weights",
        "As they are",
        "A method that packs the model's weights. The prompt is read again with them.",
    ),
    "attention": ("Attention", "Exact", "How the prompt is read. The prompt is read again with it."),
}


_SELECTING, _READING = "Chosen once the prompt is read", "Chosen while it is read, in bounded memory"


class Slot:
    """One place of a recipe: a choice of methods, and the chosen one's controls."""

    def __init__(
        self, slot: str, key: str, values: Mapping[str, Mapping[str, Any]], changed: Callable[[], None]
    ) -> None:
        label, none, help = SLOTS[slot]
        classes = methods_for(slot)
        self.classes = {cls.key: cls for cls in classes}
        options = {none: NONE} if none else {}
        options |= {name(cls): cls.key for cls in classes}
        offered: dict[str, Any] = {"options": options}
        if slot == "kv":
            offered = {"groups": _grouped(classes)}
        self.select = pmu.Select(
            label=label,
            **offered,
            value=key if key in self.classes else next(iter(options.values())),
            description=help,
            size="small",
            sizing_mode="stretch_width",
            margin=(10, 4, 2, 4),
        )
        self.form: MethodForm | None = None
        self._values = {name: dict(given) for name, given in values.items()}
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
        self.body = pn.Column(self.select, self._about, self._grid, sizing_mode="stretch_width", margin=0)
        self.select.param.watch(self._choose, "value")
        self._build()

    @property
    def key(self) -> str:
        return str(self.select.value)

    def method(self) -> Method | None:
        """The chosen method with its parameters. Raises BadParameter."""
        return None if self.form is None else self.form.method()

    def values(self) -> dict[str, dict[str, Any]]:
        """What differs from the defaults, by method."""
        return {self.key: self.form.values} if self.form is not None and self.form.values else {}

    def _choose(self, event: Any) -> None:
        if self.form is not None:
            self._values[self.form.cls.key] = self.form.values  # there again when it is chosen again
        self._build()
        self._changed()

    def _build(self) -> None:
        cls = self.classes.get(self.key)
        self.form = None if cls is None else MethodForm(cls, self._changed, self._values.get(cls.key))
        self._grid.objects = [] if self.form is None else list(self.form.widgets.values())
        self._grid.visible = bool(self._grid.objects)
        self._about.object = "" if cls is None else f"<div>{_about(cls)}</div>"
        self._about.visible = cls is not None


def name(cls: type[Method]) -> str:
    """A method's title as a choice shows it."""
    return in_label(cls.title or cls.key)


def _grouped(classes: list[type[Method]]) -> dict[str, dict[str, str]]:
    """Methods that select, and methods that read the prompt themselves, as title -> key."""
    groups: dict[str, dict[str, str]] = {_SELECTING: {}, _READING: {}}
    for cls in classes:
        reads = issubclass(cls, KVMethod) and cls.contributes("read")
        groups[_READING if reads else _SELECTING][name(cls)] = cls.key
    return {group: options for group, options in groups.items() if options}


def _about(cls: type[Method]) -> str:
    """What a method does, as markup, with a link to its paper."""
    said = in_markup(f"{cls.summary()}.")
    if cls.paper is None:
        return said
    authors = in_markup(cls.paper.authors)
    if not cls.paper.arxiv:
        return f"{said} {authors}"
    link = f"https://arxiv.org/abs/{quote(cls.paper.arxiv)}"
    return f'{said} <a href="{link}" target="_blank" rel="noopener" style="color: inherit">{authors}</a>'


class RecipeForm:
    """All places of a recipe. `changed()` is called when the recipe changes in any way but its budget."""

    def __init__(
        self, chosen: Mapping[str, str], values: Mapping[str, Mapping[str, Any]], changed: Callable[[], None]
    ) -> None:
        self.slots = {slot: Slot(slot, chosen.get(slot, NONE), values, changed) for slot in SLOTS}
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

    def keys(self) -> dict[str, str]:
        return {name: slot.key for name, slot in self.slots.items()}

    def values(self) -> dict[str, dict[str, Any]]:
        return {key: given for slot in self.slots.values() for key, given in slot.values().items()}
