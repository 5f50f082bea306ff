"""Recipes: an ordered list of methods of any family that can be run, used together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.budget import Budget
from workbench.errors import BadRecipe
from workbench.formatting import quoted
from workbench.registry import Family, Method, from_dict, method

_JOINED = "a recipe with a budget for all its methods cannot join others; give the budget to the whole"


@dataclass(frozen=True)
class Recipe:
    """Methods that are applied together, and optionally one budget for all KV methods in it.

    Without a budget of its own, each method keeps to its own: an eviction method's budget counts what stays at the
    uncompressed precision, and a storage method then shrinks that further. With one, the eviction share is chosen so
    that the stored bytes of all KV methods together meet it.
    """

    methods: tuple[Method, ...]
    budget: Budget | None = None

    def __post_init__(self) -> None:
        operators = [item.key for item in self.methods if item.family == "operator"]
        if operators:
            raise BadRecipe(
                f"{', '.join(operators)}: operators are studied on a recording, not run in the model: "
                f"session.operator({operators[0]!r}, layer, head)"
            )

    @classmethod
    def of(cls, spec: Recipe | Method | str | Sequence[Method | str], **parameters: Any) -> Recipe:
        """Read a recipe from a key, a method, a list of either, or a recipe.

        Keyword parameters go to the method; with several methods only `budget` is allowed, and is the recipe's.
        Raises UnknownMethod, BadParameter, BadBudget or BadRecipe.
        """
        if isinstance(spec, str):
            return cls((method(spec, **parameters),))
        if isinstance(spec, Method):
            changed = type(spec)(**{**dict(spec), **parameters}) if parameters else spec
            return cls((changed,))
        if isinstance(spec, Recipe):
            return cls.of(spec.methods, **{"budget": spec.budget, **parameters})
        if not isinstance(spec, Sequence):
            raise BadRecipe(f"a recipe is a method's key, a method, or a list of them, not {quoted(spec)}")
        parts = [cls.of(part) for part in spec]
        if any(part.budget is not None for part in parts):
            raise BadRecipe(_JOINED)
        items = [item for part in parts for item in part.methods]
        if not items:
            raise BadRecipe("an empty recipe: name at least one method, for instance 'full'")
        if len(items) == 1:
            given = {name: value for name, value in parameters.items() if value is not None}
            return cls.of(items[0], **given)
        budget = parameters.pop("budget", None)
        if parameters:
            raise BadRecipe(
                f"{', '.join(parameters)}: with several methods in a recipe, give parameters to the methods themselves"
            )
        return cls(tuple(items), None if budget is None else Budget.parse(budget))

    def family(self, family: Family) -> tuple[Method, ...]:
        """The methods of one family, in order."""
        return tuple(item for item in self.methods if item.family == family)

    @property
    def label(self) -> str:
        """A short name for tables and legends; cache methods whose bytes are the recipe's total name no budget."""
        if self.budget is None:
            return " + ".join(item.label() for item in self.methods)
        return " + ".join(item.label(budgeted=item.family != "kv") for item in self.methods) + f" ({self.budget})"

    def __or__(self, other: Method | Recipe) -> Recipe:
        other = Recipe.of(other)
        if other.budget is not None:
            raise BadRecipe(_JOINED)
        return Recipe.of([*self.methods, *other.methods], budget=self.budget)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, read back by `from_dict`."""
        budget = None if self.budget is None else self.budget.to_json()
        return {"methods": [item.to_dict() for item in self.methods], "budget": budget}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> Recipe:
        """Read back what `to_dict` wrote."""
        items = description.get("methods") if isinstance(description, dict) else None
        if not isinstance(items, list):
            raise BadRecipe(f"a recipe's description needs a list under 'methods': {quoted(description)}")
        return cls.of([from_dict(item) for item in items], budget=description.get("budget"))
