"""One view, two hosts: the fields of a view declared once, wrapped for notebooks (anywidget) and for the served app
(Panel).

A view is a class with annotated fields and the name of its JavaScript module in `widgets/js`. A field that has the
type `bytes` holds an array in the format of `wire.py`. Neither host knows modules that import each other without a
bundler, so `View.source()` puts the colours and `base.js` before the module's own text: this is the only way code is
shared.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from workbench.errors import BadParameter, MissingExtra
from workbench_widgets.colors import css_variables, js_constants
from workbench_widgets.standalone import standalone
from workbench_widgets.wire import unpack

if TYPE_CHECKING:
    from anywidget import AnyWidget
    from panel.custom import AnyWidgetComponent

_HERE = Path(__file__).parent


def _asset(name: str) -> str:
    """A file of widgets/js: beside the package in a checkout, inside it in an installed wheel."""
    inside = _HERE / "js" / name
    return (inside if inside.exists() else _HERE.parent / "js" / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Field:
    """One declared field: its plain type (`bytes`, `bool`, `int`, `float`, `str`, `list` or `tuple`), and whether
    None is allowed.
    """

    name: str
    kind: type
    optional: bool
    default: Any


def _field(name: str, hint: Any, default: Any) -> Field:
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return Field(name, get_origin(hint) or hint, optional, default)


class View:
    """Base of all views. `dark` is None to follow the notebook's theme (in Panel: the theme of `pn.config`).

    A subclass declares `module`, its fields, and a classmethod `data(...)` that turns plain arrays into field values.
    """

    module: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()  # further files of widgets/js that the module needs
    data: ClassVar[Callable[..., dict[str, Any]]]
    dark: bool | None = None

    @classmethod
    @cache
    def fields(cls) -> dict[str, Field]:
        """The declared fields by name, inherited ones first."""
        hints = {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}
        return {name: _field(name, hint, getattr(cls, name)) for name, hint in hints.items()}

    @classmethod
    @cache
    def source(cls) -> str:
        """The whole ES module: colours, shared functions, then the view itself."""
        return js_constants() + "".join(map(_asset, ("base.js", *cls.parts, cls.module)))

    @classmethod
    @cache
    def style(cls) -> str:
        """The style sheet, the same for all views."""
        return css_variables() + _asset("views.css")

    @classmethod
    def jupyter(cls, *args: Any, **given: Any) -> AnyWidget:
        """A widget for JupyterLab, VS Code, Colab and marimo. Takes what `data` takes, and any field by name.

        ipywidgets' own `layout` passes through. Raises `BadParameter` for any other keyword.
        """
        view: Any = cls
        return _jupyter_class(view)(**cls._values(args, given, ("layout",)))

    @classmethod
    def panel(cls, *args: Any, **given: Any) -> AnyWidgetComponent:
        """A Panel component for the served app and static pages. Takes what `data` takes, and any field by name.

        Panel's own layout keywords (`sizing_mode`, `margin`, ...) pass through. Raises `BadParameter` for any other
        keyword, `MissingExtra` where Panel is not installed.
        """
        view: Any = cls
        component: Any = _panel_class(view)
        import panel

        values = cls._values(args, given, tuple(component.param))
        if values.get("dark") is None:  # a Panel page has its own theme, whatever the browser prefers
            values["dark"] = panel.config.theme == "dark"
        return component(**{"sizing_mode": "stretch_width"} | values)

    @classmethod
    def html(cls, *args: Any, title: str = "", **given: Any) -> str:
        """A page of its own, as one HTML file that works offline. Takes what `data` takes, and any field by name.

        `dark` is None to follow the browser. What needs Python does nothing there, as finer tiles of a zoomed map.
        """
        return standalone(cls, cls._values(args, given, ()), title)

    @classmethod
    def update(cls, widget: AnyWidget | AnyWidgetComponent, *args: Any, **given: Any) -> None:
        """Show other data in a widget of either host, as one message. Takes what `jupyter` and `panel` take."""
        values = cls._values(args, given, ())
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
        cls._check((field,), ())
        host: Any = widget  # the two hosts share no base class; only an anywidget has hold_sync
        if hasattr(host, "hold_sync"):

            def changed(change: Any) -> None:
                callback(change["new"])

            host.observe(changed, names=field)
            return lambda: host.unobserve(changed, names=field)
        watcher = host.param.watch(lambda event: callback(event.new), field)
        return lambda: host.param.unwatch(watcher)

    @classmethod
    def _values(cls, args: tuple[Any, ...], given: dict[str, Any], host: tuple[str, ...]) -> dict[str, Any]:
        """Field values (and the host's own keywords) from what a caller gave."""
        known = set(inspect.signature(cls.data).parameters)
        cls._check(given.keys() - known, host)
        inputs = {name: given[name] for name in given if name in known}
        try:
            built = cls.data(*args, **inputs) if args or inputs else {}
        except TypeError as error:
            if (
                error.__traceback__ is not None and error.__traceback__.tb_next is None
            ):  # the call itself, not our code in it
                signature = inspect.signature(cls.data)
                raise BadParameter(f"{cls.__name__}: {error}. It is called as {cls.__name__}{signature}") from None
            raise
        return built | {name: value for name, value in given.items() if name not in known}

    @classmethod
    def _check(cls, names: Any, host: tuple[str, ...]) -> None:
        known = {*cls.fields(), *inspect.signature(cls.data).parameters}
        for name in names:
            if name not in known and name not in host:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise BadParameter(f"{cls.__name__} has no field {name!r}.{hint} It takes: {', '.join(sorted(known))}")

    @classmethod
    def _repr(cls, widget: object) -> str:
        """What `repr` prints in both hosts: fields that differ from their defaults, arrays as dtype and shape; no
        addresses.
        """

        def text(value: Any) -> str:
            if isinstance(value, bytes):
                array = unpack(value)
                return f"{array.dtype}{list(array.shape)}"
            if isinstance(value, list):
                return f"<{len(value)}>"
            return repr(value)

        shown = ((field.name, getattr(widget, field.name), field.default) for field in cls.fields().values())
        parts = (f"{name}={text(value)}" for name, value, default in shown if value != default)
        return f"{cls.__name__}({', '.join(parts)})"


@cache
def _jupyter_class(view: type[View]) -> type[AnyWidget]:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise MissingExtra(
            f"{view.__name__}.jupyter needs anywidget: pip install 'inference-workbench[notebooks]'"
        ) from error
    kinds: dict[type, Any] = {
        bytes: traitlets.Bytes,
        bool: traitlets.Bool,
        int: traitlets.Int,
        float: traitlets.Float,
        str: traitlets.Unicode,
        list: traitlets.List,
        tuple: traitlets.Tuple,
    }
    body: dict[str, Any] = {
        field.name: kinds[field.kind](default_value=field.default, allow_none=field.optional).tag(sync=True)
        for field in view.fields().values()
    }
    _no_clash(view, anywidget.AnyWidget)
    body |= {"_esm": view.source(), "_css": view.style(), "__repr__": lambda self: view._repr(self)}
    body |= {"__module__": view.__module__, "__doc__": view.__doc__}
    return type(f"{view.__name__}Widget", (anywidget.AnyWidget,), body)


@cache
def _panel_class(view: type[View]) -> type[AnyWidgetComponent]:
    try:
        import panel.custom
        import param
    except ImportError as error:
        raise MissingExtra(f"{view.__name__}.panel needs Panel: pip install 'inference-workbench[app]'") from error

    class Pair(param.Parameter):  # type: ignore[misc]
        """A tuple: the browser sends lists, Python code compares with tuples."""

        def __set__(self, obj: Any, value: Any) -> None:
            super().__set__(obj, tuple(value) if isinstance(value, list) else value)

    kinds: dict[type, Any] = {
        bytes: param.Bytes,
        bool: param.Boolean,
        int: param.Integer,
        float: param.Number,
        str: param.String,
        list: param.List,
        tuple: Pair,
    }
    body: dict[str, Any] = {
        field.name: kinds[field.kind](default=field.default, allow_None=field.optional)
        for field in view.fields().values()
    }
    _no_clash(view, panel.custom.AnyWidgetComponent)

    def __repr__(self: Any, depth: int = 0, max_depth: int = 10) -> str:
        return view._repr(self)

    body |= {"_esm": view.source(), "_stylesheets": [view.style()], "__repr__": __repr__}
    body |= {"__module__": view.__module__, "__doc__": view.__doc__}
    return type(f"{view.__name__}Component", (panel.custom.AnyWidgetComponent,), body)


def _no_clash(view: type[View], host: type) -> None:
    """Refuse a field that shadows something of the host: it would break the host in ways hard to find."""
    for name in view.fields():
        if hasattr(host, name):
            raise TypeError(f"{view.__name__}.{name} shadows {host.__name__}.{name}: call the field something else")
