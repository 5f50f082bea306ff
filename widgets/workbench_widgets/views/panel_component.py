"""Views in the served app and on static pages, as components of Panel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from workbench.errors import MissingExtra
from workbench_widgets.views.definition import Definition

if TYPE_CHECKING:
    from panel.custom import AnyWidgetComponent


@cache  # a browser is told of each class once, and components of one view are of one class
def panel_class(view: Definition) -> type[AnyWidgetComponent]:
    """The class of a view's components. Raises MissingExtra where Panel is not installed."""
    try:
        import panel.custom
        import param
    except ImportError as error:
        raise MissingExtra(f"{view.name}.panel needs Panel: pip install 'inference-workbench[app]'") from error

    class Pair(param.Parameter[object]):
        """A tuple: the browser sends lists, Python code compares with tuples."""

        def __set__(self, obj: object, value: object) -> None:
            super().__set__(obj, tuple(value) if isinstance(value, list) else value)

    kinds = {
        bytes: param.Bytes,
        bool: param.Boolean,
        int: param.Integer,
        float: param.Number,
        str: param.String,
        list: param.List,
        tuple: Pair,
    }
    view.require_free_names(panel.custom.AnyWidgetComponent)

    def describe(component: object, *_depths: int) -> str:  # Panel prints what lies in what
        return view.describe(component)

    body: dict[str, object] = {
        field.name: kinds[field.kind](default=field.default, allow_None=field.optional)
        for field in view.fields.values()
    }
    body |= {"_esm": view.source, "_stylesheets": [view.style], "__repr__": describe}
    body |= {"__module__": view.module, "__doc__": view.doc}
    return type(f"{view.name}Component", (panel.custom.AnyWidgetComponent,), body)
