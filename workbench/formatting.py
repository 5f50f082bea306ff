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


def quoted(value: Any, most: int = 60) -> str:
    """What somebody gave, as messages quote it: its repr in one line, of which `most` characters are shown."""
    if isinstance(value, str | bytes):
        told = repr(value[:most])
        return told if len(value) <= most else f"{told}... ({len(value):,} characters)"
    told = " ".join(_ONE_LINE.repr(value).split())
    return told if len(told) <= 2 * most else f"{told[:most]}..."


def mib(nbytes: float) -> str:
    """Bytes for people: in MiB, from 8 GiB on in GiB."""
    return f"{nbytes / 2**30:,.2f} GiB" if abs(nbytes) >= 2**33 else f"{nbytes / 2**20:,.2f} MiB"


def readable_bytes(nbytes: float) -> str:
    """Bytes for people, three digits in the unit that suits them: `11.3 MiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(nbytes) < 999.5:  # what rounds to a thousand goes on to the next unit
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB" if abs(nbytes) < 10 else f"{nbytes:,.1f} GiB"


def readable_share(share: float) -> str:
    """A share in whole percent; what is there is not told as nothing."""
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


def times_smaller(full: float, now: float) -> str:
    """How much smaller something became, in words."""
    ratio = full / max(now, 1)
    if 0.995 < ratio < 1.005:
        return "as large as before"
    return f"{ratio:.3g} times smaller" if ratio > 1 else f"{1 / ratio:.3g} times larger"


class _OneLine(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = 3
        self.maxstring, self.maxother = 80, 120

    def repr_int(self, number: int, level: int) -> str:
        digits = int(number.bit_length() * 0.30103)
        return repr(number) if digits < 40 else f"a whole number of about {digits:,} digits"

    def repr_Tensor(  # noqa: N802  reprlib finds it by the name of the type
        self, tensor: Any, level: int
    ) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


_ONE_LINE = _OneLine()
