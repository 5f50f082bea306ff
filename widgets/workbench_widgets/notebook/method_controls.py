"""Controls for notebooks, made from the methods' own descriptions: a method that is registered has its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w

from workbench.registry import Method, Parameter, find
from workbench_widgets.plain_text import in_markup
from workbench_widgets.present import CHANGED, preset_choices

NONE = ""  # the choice "none" of a dropdown


class MethodControls(w.VBox):
    """A dropdown of methods and, below it, one control for each parameter of the chosen one.

    optional: whether "none" can be chosen. values: parameters of the method that is chosen at the beginning.
    """

    def __init__(
        self,
        name: str,
        methods: tuple[type[Method], ...],
        key: str,
        on_change: Callable[[], None],
        *,
        optional: bool,
        values: Mapping[str, object] | None = None,
    ) -> None:
        self._on_change = on_change
        self._controls: dict[str, w.DOMWidget] = {}
        none = [("none", NONE)] if optional else []
        options = none + [(cls.title or cls.key, cls.key) for cls in methods]
        self.choice = w.Dropdown(options=options, value=key, layout=w.Layout(width="100%"))
        self.preset = w.Dropdown(description="values", layout=w.Layout(width="100%"))
        self.parameters = w.Box(
            layout=w.Layout(display="flex", flex_flow="row wrap", align_items="flex-start", grid_gap="2px 12px")
        )
        self._about = w.HTML()
        self._following = False
        self.choice.observe(self._rebuild, names="value")
        self.preset.observe(self._preset_chosen, names="value")
        heading = w.HTML(f'<div style="font-weight:600;line-height:1.4">{in_markup(name)}</div>')
        super().__init__(
            [heading, self.choice, self._about, self.preset, self.parameters],
            layout=w.Layout(flex="1 1 280px", width="auto", min_width="0"),
        )
        self._fill(values or {})

    def __repr__(self) -> str:
        return f"MethodControls({self.choice.value!r})"

    def method(self) -> Method | None:
        """What is chosen, without a budget; None for "none". Raises BadParameter for values that do not fit."""
        if self.choice.value == NONE:
            return None
        return find(self.choice.value)(**self._values())

    def _values(self) -> dict[str, Any]:
        cls = find(self.choice.value)
        return {
            parameter.name: _said(parameter, self._controls[parameter.name].value) for parameter in cls.parameters()
        }

    def _rebuild(self, change: object) -> None:
        self._fill({})
        self._on_change()

    def _fill(self, values: Mapping[str, object]) -> None:
        for old in self.parameters.children:
            old.close_all()
        cls = None if self.choice.value == NONE else find(self.choice.value)
        self._controls = {} if cls is None else {p.name: control(p) for p in cls.parameters()}
        for name, widget in self._controls.items():
            widget.value = _entered(widget, values.get(name, widget.value))
            widget.observe(self._edited, names="value")
        self._about.value = "" if cls is None else _small(_about(cls))
        self._offer(cls)
        described = [] if cls is None else cls.parameters()
        self.parameters.children = [_LabelledControl(p, self._controls[p.name]) for p in described]

    def _offer(self, cls: type[Method] | None) -> None:
        """The published values of the chosen method, and which of them its controls have."""
        self._following = True
        presets = () if cls is None else cls.presets
        self.preset.options = [] if cls is None else list(preset_choices(cls).items())
        self.preset.layout.display = "" if presets else "none"
        self._following = False
        self._follow()

    def _follow(self) -> None:
        cls = None if self.choice.value == NONE else find(self.choice.value)
        if cls is not None:
            self._following = True
            self.preset.value = cls.preset_of(self._values()) or CHANGED
            self._following = False

    def _edited(self, change: object) -> None:
        if not self._following:
            self._follow()
            self._on_change()

    def _preset_chosen(self, change: Mapping[str, object]) -> None:
        """All controls at the values of the preset, in one change."""
        if self._following or change["new"] in (CHANGED, None):
            return
        cls = find(self.choice.value)
        self._following = True
        for name, value in cls.preset_values(str(change["new"])).items():
            self._controls[name].value = _entered(self._controls[name], value)
        self._following = False
        self._on_change()


class _LabelledControl(w.VBox):
    """A parameter's control between its name with the unit and its help."""

    def __init__(self, parameter: Parameter, widget: w.DOMWidget) -> None:
        name = parameter.name.replace("_", " ") + (f" ({parameter.unit})" if parameter.unit else "")
        label = w.HTML(f'<div style="line-height:1.4">{in_markup(name)}</div>')
        super().__init__(
            [label, widget, w.HTML(_small(parameter.help))],
            layout=w.Layout(flex="1 1 130px", width="auto", min_width="0"),
        )

    def close_all(self) -> None:
        """Close this and what it holds: a closed box alone would leave them in the kernel."""
        for child in self.children:
            child.close()
        self.close()


def _said(parameter: Parameter, value: object) -> object:
    """The value that a control says: of a parameter that may be none, an empty text."""
    return None if value == "" and parameter.default is None else value


def _entered(widget: w.DOMWidget, value: object) -> object:
    """A value as a control holds it."""
    return ("" if value is None else str(value)) if isinstance(widget, w.Text) else value


def control(parameter: Parameter) -> w.DOMWidget:
    """The control for one parameter, with its default, its bounds, and its help on hover."""
    shared = {"value": parameter.default, "tooltip": parameter.help, "layout": w.Layout(width="100%")}
    if parameter.choices:
        return w.Dropdown(options=list(parameter.choices), **shared)
    if parameter.kind == "bool":
        return w.Checkbox(indent=False, **shared)
    if parameter.kind == "text":
        return w.Text(**shared | {"value": "" if parameter.default is None else str(parameter.default)})
    whole = parameter.kind == "int"
    if parameter.low is None or parameter.high is None:
        return (w.IntText if whole else w.FloatText)(**shared)
    bounds = {"min": parameter.low, "max": parameter.high}
    if whole:
        return w.BoundedIntText(**bounds, **shared)
    return w.BoundedFloatText(**bounds, step=(parameter.high - parameter.low) / 20, **shared)


def _about(cls: type[Method]) -> str:
    """What a method does, and how true it is to its paper."""
    if cls.fidelity is None or cls.fidelity.standing == "baseline":
        return f"{cls.summary()}."
    said = str(cls.fidelity)
    return f"{cls.summary()}. {said[:1].upper()}{said[1:]}."


def _small(text: str) -> str:
    return f'<div style="opacity:.7;font-size:12px;line-height:1.35;white-space:normal">{in_markup(text)}</div>'
