"""What a host needs to know of a view to make a class of its own for it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from workbench_widgets.views.pictures import Drawing
from workbench_widgets.views.wire import unpack


@dataclass(frozen=True)
class Field:
    """One declared field: its plain type (`bytes`, `bool`, `int`, `float`, `str`, `list` or `tuple`), and whether
    None is allowed.
    """

    name: str
    kind: type
    optional: bool
    default: object


def declared_fields(view: type) -> dict[str, Field]:
    """The annotated fields of a view's class by name, inherited ones first; a list begins empty."""
    fields = {}
    for name, hint in get_type_hints(view).items():
        if get_origin(hint) is ClassVar:
            continue
        optional = get_origin(hint) in (Union, types.UnionType)
        plain = next(part for part in get_args(hint) if part is not type(None)) if optional else hint
        kind = get_origin(plain) or plain
        fields[name] = Field(name, kind, optional, [] if kind is list else getattr(view, name))
    return fields


@dataclass(frozen=True, eq=False)  # one for each class of views: the same only as itself
class Definition:
    """A view as its hosts see it: `name`, `module` and `doc` of its class, its fields, its script and style sheet, and
    `drawings`, which makes a still picture's parts of the values of its fields.
    """

    name: str
    module: str
    doc: str | None
    fields: Mapping[str, Field]
    source: str
    style: str
    drawings: Callable[[Mapping[str, Any]], Sequence[Drawing]]

    def values(self, widget: object) -> dict[str, Any]:
        """The values of a widget's fields by name."""
        return {name: getattr(widget, name) for name in self.fields}

    def require_free_names(self, host: type) -> None:
        """Refuse a field that shadows something of the host: it would break the host in ways hard to find."""
        for name in self.fields:
            if hasattr(host, name):
                raise TypeError(f"{self.name}.{name} shadows {host.__name__}.{name}: call the field something else")

    def describe(self, widget: object) -> str:
        """What `repr` prints in both hosts: fields that differ from their defaults, arrays as dtype and shape; no
        addresses.
        """
        values = ((field.name, getattr(widget, field.name), field.default) for field in self.fields.values())
        parts = (f"{name}={_brief(value)}" for name, value, default in values if value != default)
        return f"{self.name}({', '.join(parts)})"


def _brief(value: object) -> str:
    if isinstance(value, bytes):
        array = unpack(value)
        return f"{array.dtype}{list(array.shape)}"
    if isinstance(value, list):
        return f"<{len(value)}>"
    return repr(value)
