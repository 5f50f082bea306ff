"""Recipes and tasks as they are typed: `snapkv window=16 + kivi`, `needle length=512 depth=0.1`."""

from __future__ import annotations

import json
import shlex
from typing import Any

from workbench.errors import BadParameter
from workbench.formatting import quoted

_LONGEST = 64  # characters of a number


def parts_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The keys that "+" joins, each with the parameters that follow it as name=value. Raises BadParameter."""
    return [keyed(part) for part in _parts(text)]


def keyed(text: str) -> tuple[str, dict[str, Any]]:
    """A key and the parameters that follow it; values with spaces stand in quotes. Raises BadParameter."""
    try:
        key, *settings = shlex.split(text) or [""]
    except ValueError as error:
        raise BadParameter(f"{quoted(text)} cannot be read: {error}") from None
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise BadParameter(f"{quoted(text)}: after {key} comes name=value, not {quoted(setting)}")
        values[name] = value if name == "path" else value_of(value)
    return key, values


def value_of(text: str) -> Any:
    """A number, true or false where it reads as one, else the text itself."""
    if len(text) > _LONGEST:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _parts(text: str) -> list[str]:
    """The text between plus signs; one inside a value, as in 1e+5, joins nothing."""
    parts: list[str] = []
    for piece in text.split("+"):
        joined = parts and "=" in parts[-1] and parts[-1][-1:] in "eE" and piece[:1].isdigit()
        if joined:
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return [part.strip() for part in parts]
