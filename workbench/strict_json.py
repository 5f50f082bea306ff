"""JSON that every reader takes: no NaN, no infinity, no library's own number types."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any) -> str:
    """`value` as indented JSON text; a figure that is not a finite number is written as null."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)


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
