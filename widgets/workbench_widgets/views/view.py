"""One view, two hosts: the fields of a view declared once, wrapped for notebooks (anywidget) and for the served app
(Panel).

A view is a class with annotated fields and the name of its JavaScript module in `widgets/js`. A field that has the
type `bytes` holds an array in the format of `wire.py`. Neither host knows modules that import each other without a
bundler, so `View.definition()` puts the colours and `base.js` before the module's own text: this is the only way code
is shared.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.errors import BadParameter
from workbench_widgets.colours import css_variables, js_constants
from workbench_widgets.views.definition import Definition, Field, declared_fields
from workbench_widgets.views.jupyter import jupyter_class
from workbench_widgets.views.panel_component import panel_class
from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.standalone import standalone

if TYPE_CHECKING:
    from anywidget import AnyWidget
    from panel.custom import AnyWidgetComponent

_PACKAGE = Path(__file__).parent.parent


def _asset(name: str) -> str:
    """A file of widgets/js: beside the package in a checkout, inside it in an installed wheel."""
    inside = _PACKAGE / "js" / name
    return (inside if inside.exists() else _PACKAGE.parent / "js" / name).read_text(encoding="utf-8")


_COMMENT = re.compile(r"^[ \t]*/\*(?:(?!\*/).)*\*/[ \t]*\n", re.DOTALL | re.MULTILINE)  # on lines of its own


def compact(script: str) -> str:
    """A script without indents, empty lines and comments that have lines of their own: a third smaller.

    Each view in a saved notebook or page carries its script. No line is changed within, so templates in templates stay
    as they are; the scripts of `widgets/js` have none of several lines.
    """
    lines = (line.strip() for line in _COMMENT.sub("", script).splitlines())
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("//"))


class View:
    """Base of all views. `dark` is None to follow the notebook's theme (in Panel: the theme of `pn.config`).

    A subclass declares `module`, its fields, and a classmethod `data(...)` that turns plain arrays into field values.
    """

    module: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()  # further files of widgets/js that the module needs
    data: ClassVar[Callable[..., dict[str, object]]]
    dark: bool | None = None

    @classmethod
    def drawings(cls, fields: Mapping[str, Any]) -> Sequence[Drawing]:
        """The parts of a still picture, from the values of all fields."""
        raise NotImplementedError

    @classmethod
    @cache
    def definition(cls) -> Definition:
        """What hosts make their classes of: its script is the colours, the shared functions, then the view itself."""
        return Definition(
            name=cls.__name__,
            module=cls.__module__,
            doc=cls.__doc__,
            fields=declared_fields(cls),
            source=js_constants() + compact("".join(map(_asset, ("base.js", *cls.parts, cls.module)))),
            style=css_variables() + _asset("views.css"),
            drawings=cls.drawings,
        )

    @classmethod
    def fields(cls) -> Mapping[str, Field]:
        """The declared fields by name, inherited ones first."""
        return cls.definition().fields

    @classmethod
    def jupyter(cls, *args: object, **given: object) -> AnyWidget:
        """A widget for JupyterLab, VS Code, Colab and marimo. Takes what `data` takes, and any field by name.

        ipywidgets' own `layout` passes through. Raises `BadParameter` for any other keyword.
        """
        return jupyter_class(cls.definition())(**cls.field_values(args, given, ("layout",)))

    @classmethod
    def panel(cls, *args: object, **given: object) -> AnyWidgetComponent:
        """A Panel component for the served app and static pages. Takes what `data` takes, and any field by name.

        Panel's own layout keywords (`sizing_mode`, `margin`, ...) pass through. Raises `BadParameter` for any other
        keyword, `MissingExtra` where Panel is not installed.
        """
        component = panel_class(cls.definition())
        import panel as pn

        values = cls.field_values(args, given, tuple(component.param))
        if values.get("dark") is None:  # a Panel page has its own theme, whatever the browser prefers
            values["dark"] = pn.config.theme == "dark"
        return component(**{"sizing_mode": "stretch_width"} | values)

    @classmethod
    def html(cls, *args: object, title: str = "", **given: object) -> str:
        """A page of its own, as one HTML file that works offline. Takes what `data` takes, and any field by name.

        `dark` is None to follow the browser. What needs Python does nothing there, as finer tiles of a zoomed map.
        """
        return standalone(cls.definition(), cls.field_values(args, given), title)

    @classmethod
    def update(cls, widget: AnyWidget | AnyWidgetComponent, *args: object, **given: object) -> None:
        """Show other data in a widget of either host, as one message. Takes what `jupyter` and `panel` take."""
        values = cls.field_values(args, given)
        host: Any = widget  # the two hosts share no base class; only an anywidget has hold_sync
        if hasattr(host, "hold_sync"):
            with host.hold_sync():
                for name, value in values.items():
                    setattr(host, name, value)
        else:
            host.param.update(**values)

    @classmethod
    def watch(
        cls, widget: AnyWidget | AnyWidgetComponent, field: str, callback: Callable[[Any], object]
    ) -> Callable[[], None]:
        """Call `callback(new value)` whenever `field` changes, in the browser or in Python; returns a function that
        stops it.
        """
        cls._check((field,))
        host: Any = widget  # the two hosts share no base class; only an anywidget has hold_sync
        if hasattr(host, "hold_sync"):

            def changed(change: Any) -> None:
                callback(change["new"])

            host.observe(changed, names=field)
            return lambda: host.unobserve(changed, names=field)
        watcher = host.param.watch(lambda event: callback(event.new), field)
        return lambda: host.param.unwatch(watcher)

    @classmethod
    def field_values(
        cls, args: tuple[object, ...], given: Mapping[str, object], host_keywords: tuple[str, ...] = ()
    ) -> dict[str, object]:
        """Field values, and the host's own keywords, from arguments of `data` and fields by name.

        Raises BadParameter for a keyword that is neither, and for arguments that `data` does not take.
        """
        data_keywords = inspect.signature(cls.data).parameters.keys()
        cls._check(given.keys() - data_keywords, host_keywords)
        inputs = {name: value for name, value in given.items() if name in data_keywords}
        try:
            values = cls.data(*args, **inputs) if args or inputs else {}
        except TypeError as error:
            # The call itself was wrong, not our code in it.
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:
                signature = inspect.signature(cls.data)
                raise BadParameter(f"{cls.__name__}: {error}. It is called as {cls.__name__}{signature}") from None
            raise
        return values | {name: value for name, value in given.items() if name not in data_keywords}

    @classmethod
    def _check(cls, names: Iterable[str], host_keywords: tuple[str, ...] = ()) -> None:
        known = {*cls.fields(), *inspect.signature(cls.data).parameters}
        for name in names:
            if name not in known and name not in host_keywords:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise BadParameter(f"{cls.__name__} has no field {name!r}.{hint} It takes: {', '.join(sorted(known))}")
