"""Which recipes are compared: every registered KV method, and a few that say what single methods do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.claims import claims
from benchmarks.kv_cases import ASKED_LATER, TASKS
from workbench.kv.base import KVMethod
from workbench.kv.stores.format import Format, PackedFormat, Shape
from workbench.recipe import Recipe
from workbench.registry import method, registered

NOTES = Path(__file__).with_name("kv_quality_notes.toml")
OWN = "own"  # the budget of what has a fixed size


class PerToken2Bit(KVMethod):
    """Quantise every key and value to 2 bits token by token, 32 channels a scale: what KIVI argues against."""

    key = "per-token-2bit"

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        return PackedFormat(dtype, 2, 32, residual=0, key_axis="token")


@dataclass(frozen=True)
class Entry:
    """A recipe, and where it is measured: at every budget, at the size that it has without one, or both.

    also: at these budgets besides. at: at these only. tasks: on these only.
    """

    recipe: Recipe
    budgeted: bool = True
    own: bool = False
    also: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS

    def budgets(self, wanted: Sequence[float]) -> list[str]:
        if self.at:
            return list(self.at)
        found = [*([OWN] if self.own else []), *(f"{budget:g}" for budget in wanted if self.budgeted), *self.also]
        return list(dict.fromkeys(found))

    def under(self, budget: str) -> Recipe:
        """The recipe at a budget."""
        return self.recipe if budget == OWN else Recipe.of(self.recipe, budget=float(budget))


def fixed(recipe: Recipe) -> Entry:
    """A recipe that is measured at its own size only."""
    return Entry(recipe, budgeted=False, own=True)


def entries(names: Sequence[str] = ()) -> dict[str, Entry]:
    """All recipes by name, or those named with their ablations; the full cache always."""
    found = {
        cls.key: Entry(Recipe.of(cls.key), budgeted=cls.takes_budget(), own=cls.default_budget is None)
        for cls in registered("kv")
    }
    found |= {
        "kivi 4-bit": fixed(Recipe.of("kivi", bits=4)),
        "kivi 2-bit, no residual": fixed(Recipe.of("kivi", bits=2, residual=0)),
        "quest, 128 tokens": fixed(Recipe.of("quest", tokens=128)),  # at its default these texts are read whole
        "per-token 2-bit": fixed(Recipe((PerToken2Bit(),))),
        "kvzip, equal heads": Entry(Recipe.of("kvzip", heads="equal")),
        "snapkv + adakv + mikv": Entry(Recipe.of([method("snapkv"), method("adakv"), method("mikv")])),
    }
    for claim in claims(NOTES).values():
        for judged in filter(None, (claim.judged, claim.against)):
            found[judged] = replace(found[judged], also=(*found[judged].also, claim.at))
        for name, ablation in claim.ablations.items():
            found[claim.row(name)] = Entry(ablation.recipe, at=(claim.budget(name),), tasks=claim.tasks or ASKED_LATER)
    unknown = set(names) - set(found)
    if unknown:
        raise SystemExit(f"no recipe {', '.join(sorted(unknown))}: there are {', '.join(found)}")
    wanted = {"full", *names}
    return {name: entry for name, entry in found.items() if not names or {name, name.partition(":")[0]} & wanted}
