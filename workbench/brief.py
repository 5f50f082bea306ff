"""Results in one line: of tensors their type and shape, never the numbers in them."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any


class Brief:
    """A dataclass (declared with `repr=False`) that shows its fields in one line, however large they are."""

    def __repr__(self) -> str:
        told = (f"{x.name}={_ONE_LINE.repr(getattr(self, x.name))}" for x in fields(self) if x.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(told)})"


def mib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**20:.2f} MiB"


class _OneLine(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = 3
        self.maxstring, self.maxother = 80, 120

    def repr_Tensor(self, tensor: Any, level: int) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


_ONE_LINE = _OneLine()
