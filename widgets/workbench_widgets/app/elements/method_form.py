"""Controls made from the methods' own descriptions: a method that is registered has its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import panel_material_ui as pmu
from panel_material_ui.widgets.base import MaterialWidget
from param.parameterized import Event

from workbench.published import OURS
from workbench.registry import Method, Parameter
from workbench_widgets.app.elements.text_field import TextField
from workbench_widgets.plain_text import in_label
from workbench_widgets.present import CHANGED, preset_choices


def control(parameter: Parameter, value: object = None) -> MaterialWidget:
    """The widget for one parameter, at `value` or its default, with its bounds, unit and help."""
    shared: dict[str, object] = {
        "label": in_label(label(parameter)),
        "description": in_label(parameter.help) or None,
        "size": "small",
        "sizing_mode": "stretch_width",
        "margin": (6, 4),
    }
    value = parameter.default if value is None else value
    if parameter.kind == "bool":
        return pmu.Checkbox(value=value, **shared)
    if parameter.kind == "choice":
        return pmu.Select(options=_options(parameter.choices or ()), value=value, **shared)
    if parameter.kind == "int":
        bounds: dict[str, object] = {
            "start": _int(parameter.low),
            "end": _int(parameter.high),
            "step": int(parameter.step or 1),
        }
        return pmu.IntInput(value=value, **bounds, **shared)
    if parameter.kind == "float":
        bounds = {"start": parameter.low, "end": parameter.high, "step": parameter.step or _step(parameter)}
        return pmu.FloatInput(value=value, **bounds, **shared)
    return TextField(value="" if value is None else str(value), **shared)


class Menu(pmu.Select):
    """A select whose `groups` change while it is on a page.

    A browser that draws slowly answers a second change with the choices of the first and goes on showing those:
    where choices come back, the current ones are sent again (nothing is sent if they are the same).
    """

    def _process_property_change(self, props: dict[str, object]) -> dict[str, object]:
        if "options" in props:
            self.param.trigger("groups")
        changed: dict[str, object] = super()._process_property_change(props)
        return changed


def label(parameter: Parameter) -> str:
    """`window (tokens)`: the parameter's name as people write it, with its unit."""
    name = parameter.name.replace("_", " ")
    name = name[:1].upper() + name[1:]
    return f"{name} ({parameter.unit})" if parameter.unit else name


def method_title(cls: type[Method]) -> str:
    """A method's title as a choice shows it."""
    return in_label(cls.title or cls.key)


class MethodForm:
    """The controls of one method, and the method they describe.

    preset: a choice of the published values, where the method has any; it follows what is changed by hand.
    """

    def __init__(
        self, cls: type[Method], changed: Callable[[], None], values: Mapping[str, object] | None = None
    ) -> None:
        start = values or {}
        self.cls = cls
        self.widgets = {p.name: control(p, start.get(p.name)) for p in cls.parameters()}
        self.preset = _preset_menu(cls) if cls.presets else None
        self._changed, self._following = changed, False
        self._follow()
        for widget in self.widgets.values():
            widget.param.watch(self._edited, "value")
        if self.preset is not None:
            self.preset.param.watch(self._chosen, "value")

    @property
    def controls(self) -> list[MaterialWidget]:
        """All of them, in the order in which they are shown."""
        return [*([] if self.preset is None else [self.preset]), *self.widgets.values()]

    def _edited(self, event: Event) -> None:
        if not self._following:
            self._follow()
            self._changed()

    def _follow(self) -> None:
        """Let the choice of presets say what the controls have."""
        if self.preset is not None:
            self._following = True
            self.preset.value = self.cls.preset_of(self.values) or CHANGED
            self._following = False

    def _chosen(self, event: Event) -> None:
        """All controls at the values of the preset, in one change."""
        if self._following or event.new == CHANGED:
            return
        self._following = True
        for name, value in self.cls.preset_values(event.new).items():
            self.widgets[name].value = value
        self._following = False
        self._changed()

    @property
    def values(self) -> dict[str, Any]:
        """What differs from the method's defaults; an emptied field counts as the default."""
        defaults = {p.name: p.default for p in self.cls.parameters()}
        current = {name: widget.value for name, widget in self.widgets.items()}
        return {name: value for name, value in current.items() if value is not None and value != defaults[name]}

    def method(self) -> Method:
        """The method as the controls describe it. Raises BadParameter where they contradict each other."""
        return self.cls(**self.values)


def _preset_menu(cls: type[Method]) -> MaterialWidget:
    """A choice of where a method's parameters come from."""
    sources = "; ".join(f"{preset.name}: {preset.source}" for preset in cls.presets)
    return pmu.Select(
        label="Values",
        options={in_label(shown): name for shown, name in preset_choices(cls).items()},
        value=OURS,
        description=in_label(sources),
        size="small",
        sizing_mode="stretch_width",
        margin=(6, 4),
    )


def _options(choices: tuple[object, ...]) -> dict[str, object]:
    return {in_label(choice): choice for choice in choices}


def _int(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def _step(parameter: Parameter) -> float:
    if parameter.low is None or parameter.high is None:
        return 0.1
    return float((parameter.high - parameter.low) / 20)
