"""JSON that every reader takes: no NaN, no infinity, no library's own number types; JSON from outside, bounded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from workbench.files.paths import regular

_DEPTH = 64  # of lists and objects within each other; configs and indices have four or five
_SIZE = 32 << 20  # bytes; the largest index of shards has about ten million


class NotAnObject(ValueError):
    """Sound JSON that is a list, a text or a figure where an object is expected."""


def dumps(value: Any) -> str:
    """`value` as indented JSON text; a figure that is not a finite number is written as null."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)


def read(path: Path, most: int = _SIZE) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes and bounded depth.

    Raises OSError where it cannot be read or is no regular file, and ValueError, in one line, where it is not UTF-8
    text, not JSON, nested too deep, or not an object.
    """
    return loads(regular(path, most).read_text(encoding="utf-8"))


def loads(text: str) -> dict[str, Any]:
    """The JSON object in `text`; ValueError as in `read`."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise NotAnObject(f"a JSON object is expected, found {type(found).__name__}")
    if _deeper(found, _DEPTH):
        raise ValueError(f"it is nested deeper than {_DEPTH} levels")
    return found


def plain(value: Any) -> Any:
    """`value` in dicts, lists, text, bools and finite numbers only; anything unknown becomes its text."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, str):  # half a pair of surrogates, from a file name in another encoding, is no text
        return value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # scalars of NumPy and torch
        return plain(value.item())
    return str(value)


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie within each other in more than `levels` levels. Level by level: no recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
