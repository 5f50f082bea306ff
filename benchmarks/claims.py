"""What each method's paper claims, by which rows it is judged, and which ablation shows why it fails where it does.

A claim is a table of a TOML file:

    near      the loss that it allows (nats a token, or whatever the figure is)
    against   the recipe that it says to beat
    at        the budget at which ("own": the size that the recipe has without one)
    tasks     on which cases
    recipe    which row is judged, if not that of the method's key
    why       the reason why it fails, of which nothing is printed unless the rows of `shown_by` show it
    shown_by  names of ablations, each of which loses less than what is judged
    elsewhere what these rows cannot judge, and why

and [KEY.ablations] has, by name, the parameters that an ablation changes: those of the method, or with `recipe` a list
of keys or of descriptions of methods as `to_dict` writes them; `at` gives it another budget. KEY is a method's, or the
name of a row that begins with it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from workbench.recipe import Recipe
from workbench.registry import from_dict

_ABLATIONS = "ablations"


@dataclass(frozen=True)
class Ablation:
    """A recipe that differs from a method's in what may explain a loss. at: its budget; None: the claim's."""

    recipe: Recipe
    at: str | None = None

    @classmethod
    def of(cls, key: str, changes: Mapping[str, Any]) -> Ablation:
        changed = dict(changes)
        at = changed.pop("at", None)
        spec = changed.pop("recipe", key.split(maxsplit=1)[0])
        if not isinstance(spec, str):
            spec = [from_dict(dict(part)) if isinstance(part, Mapping) else part for part in spec]
        return cls(Recipe.of(spec, **changed), None if at is None else str(at))


@dataclass(frozen=True)
class Claim:
    """How one method's claim is judged; see the module."""

    key: str
    at: str = "own"
    near: float | None = None
    against: str = ""
    tasks: tuple[str, ...] = ()
    recipe: str = ""
    why: str = ""
    shown_by: tuple[str, ...] = ()
    elsewhere: str = ""
    ablations: Mapping[str, Ablation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.near is not None and self.against) or not (self.near is not None or self.against or self.elsewhere):
            raise ValueError(f"{self.key}: a claim is near a figure or against a recipe")
        if bool(self.why) != bool(self.shown_by):
            raise ValueError(f"{self.key}: a reason names the ablations that show it, and nothing else does")
        if unknown := set(self.shown_by) - set(self.ablations):
            raise ValueError(f"{self.key}: no ablation is called {', '.join(sorted(unknown))}")

    @property
    def judged(self) -> str:
        """The name of the row that is judged."""
        return self.recipe or self.key

    def row(self, ablation: str) -> str:
        """The name of an ablation's row."""
        return f"{self.key}: {ablation}"

    def budget(self, ablation: str) -> str:
        """The budget of an ablation's row."""
        return self.ablations[ablation].at or self.at

    def reason(self, told: Mapping[str, str], shown: Collection[str]) -> str:
        """Why it fails. told: the figures of its ablations; shown: those that lose less than what is judged."""
        tried = ", ".join(f"{name} {figure}" for name, figure in told.items())
        if self.why and set(self.shown_by) <= set(shown):
            return f"{self.why} ({tried})"
        return f"not known (tried: {tried})" if tried else "not known"


def claims(file: Path) -> dict[str, Claim]:
    """The claims of a file by method. Raises ValueError where one contradicts itself."""
    return {key: _claim(key, table) for key, table in tomllib.loads(file.read_text(encoding="utf-8")).items()}


def _claim(key: str, table: Mapping[str, Any]) -> Claim:
    if unknown := set(table) - {item.name for item in fields(Claim)}:
        raise ValueError(f"{key}: unknown {', '.join(sorted(unknown))}")
    values = dict(table)
    ablations = {name: Ablation.of(key, changes) for name, changes in values.pop(_ABLATIONS, {}).items()}
    at, tasks, shown_by = str(values.pop("at", "own")), values.pop("tasks", ()), values.pop("shown_by", ())
    return Claim(key, at, tasks=tuple(tasks), shown_by=tuple(shown_by), ablations=ablations, **values)
