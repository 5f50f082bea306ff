"""How an entry of the catalogue stands to what its authors published, and the values that they published."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Standing = Literal[
    "as published",
    "deviates",
    "untrained part of a trained method",
    "reconstructed from the abstract",
    "baseline",
]
OURS = "ours"  # the preset of every method: its defaults


@dataclass(frozen=True)
class Fidelity:
    """How true an entry is to its paper. how: in one line what differs or is missing, or what was left open.

    A baseline has no paper of its own. Whoever shows a method's claim shows this beside it.
    """

    standing: Standing
    how: str = ""

    def __post_init__(self) -> None:
        if self.standing not in get_args(Standing):
            raise TypeError(f"fidelity {self.standing!r}: it is one of {', '.join(get_args(Standing))}")
        if not self.how and self.standing not in ("as published", "baseline"):
            raise TypeError(f"an entry that is {self.standing!r} says how")

    def __str__(self) -> str:
        return f"{self.standing}: {self.how}" if self.how else self.standing


class Preset:
    """Values that one source gives for a method's parameters; what it leaves open keeps its default.

    name: what it is chosen by. source: a section of the paper, or repository, file and commit.
    """

    def __init__(self, name: str, source: str, **values: Any) -> None:
        if name == OURS:
            raise TypeError(f"{OURS!r} is the preset of the defaults")
        self.name, self.source, self.values = name, source, MappingProxyType(values)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"Preset({self.name!r}, {values})"
