"""The places of a recipe, and which methods stand in each."""

from __future__ import annotations

from typing import Any

from workbench.budget import Budget
from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.recipe import Recipe
from workbench.registry import Method, registered

CACHE_SLOTS = ("kv", "refine", "allocate", "store", "retrieve", "select", "evict")
RECIPE_SLOTS = (*CACHE_SLOTS, "weights", "attention")


def kv_methods(slot: str) -> list[type[Method]]:
    """The KV methods for one place: "kv" (which tokens stay), "refine" (what becomes of their scores), "allocate" (how
    many each head), "store", "retrieve",
    "select" (what a new token attends to), "evict" (what leaves while decoding, by the scores of the first).
    """
    methods: list[type[Method]] = []
    for cls in registered("kv"):
        assert issubclass(cls, KVMethod)
        fits = cls.only_rescores() if slot == "evict" else cls.contributes(slot)
        if slot == "kv":
            beside = cls.only_rescores() or any(map(cls.contributes, ("store", "retrieve", "select")))
            fits = cls.contributes("score") or not beside
        if fits:
            methods.append(cls)
    return sorted(methods, key=lambda cls: cls.key != Full.key)  # the uncompressed cache first


def methods_for(slot: str) -> list[type[Method]]:
    """The methods for one place of a recipe, of the cache or of another family."""
    return kv_methods(slot) if slot in CACHE_SLOTS else list(registered(slot))


def parts_of(recipe: Recipe) -> dict[str, Any]:
    """The fields of a page's state that describe a recipe: its places, parameters and budgets.

    A method that has no free place, as one of two that select, is left out.
    """
    parts: dict[str, Any] = dict.fromkeys(RECIPE_SLOTS, "") | {"kv": Full.key, "weights_budget": "", "values": {}}
    budget = recipe.budget
    taken: set[str] = set()
    for method in recipe.methods:
        slots = CACHE_SLOTS if method.family == "kv" else (method.family,)
        slot = next((s for s in slots if s not in taken and type(method) in methods_for(s)), None)
        if slot is None:
            continue
        taken.add(slot)
        parts[slot] = method.key
        defaults = {p.name: p.default for p in method.parameters()}
        values = {name: getattr(method, name) for name, default in defaults.items() if getattr(method, name) != default}
        if values:
            parts["values"][method.key] = values
        if method.family == "kv":
            budget = budget or method.effective_budget
        elif method.family == "weights" and method.budget is not None:
            parts["weights_budget"] = _written(method.budget)
    return parts if budget is None else parts | {"budget": _written(budget)}


def _written(budget: Budget) -> str:
    """A budget as the page writes it: shares in percent."""
    return f"{100 * budget.amount:g}%" if budget.kind == "share" else str(budget)
