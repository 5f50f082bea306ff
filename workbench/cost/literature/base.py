"""A system from the literature as a model of it: its paper's claim, and what the same idea gives here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.described import Described
from workbench.display import Shown
from workbench.errors import BadParameter
from workbench.parameters import closest
from workbench.registry import Paper

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Outcome(Shown):
    """What a system's model gives. rows: one a figure or a setting, whose names are the table's columns.

    Everything here is a model's: the paper's own hardware, models and traces are not, and its figures are only quoted.
    """

    system: str
    claim: str
    rows: tuple[Mapping[str, Any], ...]
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    def summary(self) -> str:
        """Claim, figures and note as text."""
        lines = [f"{self.system} (a model)", f"  the paper claims: {self.claim}"]
        lines += [f"  {', '.join(f'{name} {_told(value)}' for name, value in row.items())}" for row in self.rows]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    def numbers(self) -> dict[str, Any]:
        """The same, JSON-able."""
        rows = [dict(row) for row in self.rows]
        return {"system": self.system, "claim": self.claim, "kind": "model", "rows": rows, "note": self.note}

    def __repr__(self) -> str:
        return f"<Outcome of {self.system}: {len(self.rows)} rows>"


class System(Described):
    """A system from the literature, whose parameters say what is modelled. `run` gives its outcome."""

    paper: ClassVar[Paper | None] = None
    claim: ClassVar[str] = ""

    @abstractmethod
    def run(self) -> Outcome:
        """Its model, beside what it is compared with."""

    def outcome(self, *rows: Mapping[str, Any], note: str = "") -> Outcome:
        """These rows as this system's."""
        return Outcome(self.key, self.claim, rows, note)


def ratio(name: str, before: float, after: float) -> dict[str, Any]:
    """A figure without and with the system, and the one over the other."""
    return {"figure": name, "without": before, "with": after, "times": before / after if after else float("inf")}


def found(key: str, known: Mapping[str, type[System]]) -> type[System]:
    """The system of this key. Raises BadParameter, naming the closest."""
    if not isinstance(key, str) or key not in known:
        hint = closest(key, list(known), 1) if isinstance(key, str) else []
        meant = f"did you mean {hint[0]}? " if hint else ""
        raise BadParameter(f"unknown system {key!r}: {meant}There are {', '.join(known)}")
    return known[key]


def _told(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
