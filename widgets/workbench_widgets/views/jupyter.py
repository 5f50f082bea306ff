"""Views in JupyterLab, VS Code, Colab and marimo, by way of anywidget."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from workbench.errors import MissingExtra
from workbench_widgets.views.definition import Definition
from workbench_widgets.views.pictures import PNG, Drawing, png

if TYPE_CHECKING:
    from anywidget import AnyWidget


@cache  # a browser is told of each class once, and widgets of one view are of one class
def jupyter_class(view: Definition) -> type[AnyWidget]:
    """The class of a view's widgets. Raises MissingExtra where anywidget is not installed."""
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise MissingExtra(
            f"{view.name}.jupyter needs anywidget: pip install 'inference-workbench[notebooks]'"
        ) from error
    kinds = {
        bytes: traitlets.Bytes,
        bool: traitlets.Bool,
        int: traitlets.Int,
        float: traitlets.Float,
        str: traitlets.Unicode,
        list: traitlets.List,
        tuple: traitlets.Tuple,
    }
    view.require_free_names(anywidget.AnyWidget)

    def describe(widget: object) -> str:
        return view.describe(widget)

    def drawings(widget: Any) -> Sequence[Drawing]:
        return view.drawings(view.values(widget))

    def bundle(widget: Any, **_: Any) -> dict[str, Any]:
        return with_picture(widget, png(drawings(widget)))

    body: dict[str, object] = {
        field.name: kinds[field.kind](default_value=field.default, allow_none=field.optional).tag(sync=True)
        for field in view.fields.values()
    }
    body |= {
        "_repr_mimebundle_": bundle,
        "drawings": drawings,
        "_esm": view.source,
        "_css": view.style,
        "__repr__": describe,
    }
    body |= {"__module__": view.module, "__doc__": view.doc}
    return type(f"{view.name}Widget", (anywidget.AnyWidget,), body)


def with_picture(widget: object, picture: bytes) -> dict[str, Any]:
    """The MIME bundle of a widget, with a still picture (PNG) beside it for where there is no kernel."""
    import ipywidgets

    bundle = ipywidgets.DOMWidget._repr_mimebundle_(widget)
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    return {**(data or {}), PNG: b64encode(picture).decode()}
