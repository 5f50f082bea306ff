"""Hardware as data: peaks of a device, each figure with its source. Users' own files have the same form."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.errors import BadParameter, InputError, NotApplicable
from workbench.files.paths import place, regular
from workbench.formatting import quoted
from workbench.parameters import closest

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["gpu", "apple", "cpu", "fpga", "drive"]

_SCALE = {"GB": 1e9, "GiB": 2.0**30, "GB/s": 1e9, "TFLOP/s": 1e12, "W": 1.0, "USD/h": 1.0}
_LARGEST = 1 << 20  # bytes of a file of profiles


class Figure(BaseModel):
    """A figure of a data sheet: its value, unit, and where it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    unit: Literal["GB", "GiB", "GB/s", "TFLOP/s", "W", "USD/h"]
    source: str

    @property
    def plain(self) -> float:
        """In bytes, bytes a second, operations a second, watts, or dollars an hour."""
        return self.value * _SCALE[self.unit]

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


class Hardware(BaseModel):
    """A device's peaks. memory: what it holds; bandwidth: of that memory; compute: by the type of number, dense.

    host_link: to host memory, device_link: to another device, each in one direction; write: of a drive; power: at most;
    price: an hour, which no file of ours states.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    memory: Figure
    bandwidth: Figure
    compute: dict[str, Figure] = {}
    aliases: tuple[str, ...] = ()
    host_link: Figure | None = None
    device_link: Figure | None = None
    write: Figure | None = None
    power: Figure | None = None
    price: Figure | None = None

    def peak(self, dtype: str) -> Figure:
        """Operations a second with such numbers; its int8 peak where it states no other. Raises NotApplicable."""
        found = self.compute.get(dtype) or self.compute.get("int8")
        if found is None:
            raise NotApplicable(f"{self.name} computes nothing: it is a {self.kind}; name a device that does")
        return found

    def summary(self) -> str:
        """Every figure with its source, one a line."""
        rows = {name: getattr(self, name) for name in ("memory", "bandwidth", "host_link", "device_link", "power")}
        rows |= {f"compute {name}": figure for name, figure in self.compute.items()}
        told = (f"  {name:18} {figure!s:>14}  {figure.source}" for name, figure in rows.items() if figure is not None)
        return "\n".join([f"{self.name} ({self.kind})", *told])


def profiles() -> tuple[Hardware, ...]:
    """The devices that come with the workbench, in the order of their files."""
    folder = files("workbench.cost") / "data" / "hardware"
    named = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return tuple(made for file in named for made in _read(file.read_text(encoding="utf-8"), file.name))


def hardware(device: str | Path | Hardware) -> Hardware:
    """A device by its name, or from a TOML file of the same form as ours ("mine.toml", "mine.toml:name" of several).

    Raises BadParameter for a name that nothing has, InputError for a file that cannot be read.
    """
    if isinstance(device, Hardware):
        return device
    if not isinstance(device, str | Path) or not str(device).strip():
        raise BadParameter(f"hardware is {quoted(device)}: give a name, a .toml file, or a Hardware")
    text = str(device)
    path, _, name = text.partition(".toml:")
    if name or text.endswith(".toml"):
        return _chosen(_of_file(place(f"{path}.toml" if name else text)), name, text)
    return _chosen(profiles(), text, text)


def catalogue() -> pd.DataFrame:
    """The devices that come with the workbench: one row each, in GB, GB/s and TFLOP/s."""
    import pandas as pd

    rows = [
        {
            "name": each.name,
            "kind": each.kind,
            "memory_gb": each.memory.plain / 1e9,
            "bandwidth_gb_s": each.bandwidth.plain / 1e9,
            "tflops_16bit": each.compute["bfloat16"].value if "bfloat16" in each.compute else None,
            "tops_int8": each.compute["int8"].value if "int8" in each.compute else None,
        }
        for each in profiles()
    ]
    return pd.DataFrame(rows)


def _chosen(known: tuple[Hardware, ...], name: str, asked: str) -> Hardware:
    if not name and len(known) == 1:
        return known[0]
    names = {plain: each for each in known for plain in _plain_names(each)}
    found = names.get(_plain(name))
    if found is None:
        hint = closest(_plain(name), list(names), 1)
        meant = f"did you mean {names[hint[0]].name}? " if hint else ""
        there = ", ".join(each.name for each in known)
        raise BadParameter(f"hardware {quoted(asked)} is not known: {meant}There are {there}; or give a .toml file")
    return found


def _plain_names(each: Hardware) -> Iterator[str]:
    yield from (_plain(name) for name in (each.name, *each.aliases))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _of_file(path: Path) -> tuple[Hardware, ...]:
    try:
        return _read(regular(path, _LARGEST).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read(text: str, name: str) -> tuple[Hardware, ...]:
    try:
        rows: Any = tomllib.loads(text).get("hardware")
        if not isinstance(rows, list) or not rows:
            raise ValueError("it has no [[hardware]]")  # noqa: TRY301  said in one place with the others
        return tuple(Hardware(**row) for row in rows)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{name}: {where} is wrong ({first['msg'].lower()})") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: no file of hardware ({error})") from error
