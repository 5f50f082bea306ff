"""A method's parameters: declared, described for controls and help texts, and what is wrong with those given."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from workbench.formatting import quoted

Kind = Literal["int", "float", "bool", "choice", "text"]

_PARTS = 5  # of what is wrong with a method's parameters that a message tells
_NAME = 64  # characters of an unknown name that are compared with those that are known
_KINDS: dict[object, Kind] = {int: "int", float: "float", bool: "bool"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as controls and help texts need it."""

    name: str
    kind: Kind
    default: Any
    help: str
    unit: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    step: float | None = None  # values lie this far apart, counted from `low`: 2 for odd ones
    own: str = ""  # why the default is none that the authors published

    @classmethod
    def of(cls, name: str, field: FieldInfo) -> Parameter:
        """A method's parameter as its class declares it."""
        extra = declared(field)
        bounds = {
            bound: value
            for rule in field.metadata
            for bound in ("ge", "gt", "le", "lt", "multiple_of")
            if (value := getattr(rule, bound, None)) is not None
        }
        choices = choices_of(field)
        return cls(
            name=name,
            kind="choice" if choices else _KINDS.get(field.annotation, "text"),
            default=field.default,
            help=field.description or "",
            unit=extra.get("unit"),
            low=bounds.get("ge", bounds.get("gt")),
            high=bounds.get("le", bounds.get("lt")),
            choices=choices or None,
            step=2 if extra.get("odd") else bounds.get("multiple_of"),
            own=extra.get("own", ""),
        )


def param(default: Any, *, help: str, unit: str | None = None, odd: bool = False, own: str = "", **bounds: Any) -> Any:
    """Declare a method's parameter: its default, bounds (`ge`, `gt`, `le`, `lt`), unit and one line of help.

    own: why the default is not what the first of the method's presets to name it has, or that no source gives one.
    """
    return Field(default, description=help, json_schema_extra={"unit": unit, "odd": odd, "own": own}, **bounds)


def declared(field: FieldInfo) -> dict[str, Any]:
    """The unit of a parameter, whether it must be odd and why its default is our own, as `param` was told."""
    return cast("dict[str, Any]", field.json_schema_extra or {})


def choices_of(field: FieldInfo) -> tuple[Any, ...]:
    """The values of a parameter that is one of several; none for others."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's own; everything else as it is, for text is no number and a bool is none either."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value


def explained(key: str, names: Sequence[str], error: ValidationError) -> str:
    """One line for everything that is wrong with the parameters of the method `key`, which has those in `names`."""
    parts = list(_problems(names, error))
    return f"{key}: " + "; ".join(parts[:_PARTS]) + ("; and more" if len(parts) > _PARTS else "")


def _problems(names: Sequence[str], error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            close = closest(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"unknown parameter {quoted(name)}{hint} It takes {', '.join(names)}"
            continue
        message = problem["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        yield message if name == "budget" else f"{name}={quoted(problem['input'])}: {message}"


def closest(name: str, names: Sequence[str], count: int) -> list[str]:
    """Which of `names` somebody may have meant by another one, at most `count`."""
    return difflib.get_close_matches(name[:_NAME], names, n=count)
