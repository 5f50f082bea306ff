"""The metadata of a GGUF file by key: typed, and accounted for."""

from __future__ import annotations

import math
from typing import Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header

_REQUIRED: Any = object()
_LARGEST = 1 << 27  # of any count in a header; real contexts end at ten million tokens


class Settings:
    """The metadata of one architecture by key, which remembers what was taken."""

    def __init__(self, header: Header) -> None:
        self.header, self.prefix = header, header.architecture + "."
        self.left = {key for key in header.metadata if key.startswith(self.prefix)}

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        name = self.prefix + key
        self.left.discard(name)
        value = self.header.metadata.get(name, default)
        if value is _REQUIRED:
            raise CheckpointRefused(f"{self.header.path}: the metadata lacks {name}; download it again")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.take(key, default)
        if value is default and default is not _REQUIRED:
            return default  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
            raise self.refusal(key, f"is {shortened(value)}, not one whole number")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.take(key, default)
        if value is default and default is not _REQUIRED:
            return default  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(key, f"is {shortened(value)}, not one finite number")
        return float(value)

    def refusal(self, key: str, why: str) -> CheckpointRefused:
        return CheckpointRefused(
            f"{self.header.path}: {self.prefix}{key} {why}; use another file or a safetensors folder of the same model"
        )


def shortened(value: object) -> str:
    """A value of the file as messages quote it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
