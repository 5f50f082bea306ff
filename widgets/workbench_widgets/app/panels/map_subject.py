"""Whose attention a map shows, and what that takes."""

from __future__ import annotations

from typing import NamedTuple

from workbench.attention.base import AttentionMethod
from workbench.attention.operators import Operator
from workbench.inspection.captured import changes_reading, has_to_run
from workbench.recipe import Recipe
from workbench_widgets import present

_RUNNING = 10  # how much longer an entry takes where an attention method has to run for it, over 1,000 to 2,000 tokens


class MapSubject(NamedTuple):
    """Whose attention is shown: of `recipe` (None: all keys), where `difference` less that of `base`.

    operator: one whose implied attention is shown instead.
    """

    recipe: Recipe | None
    base: Recipe | None = None
    difference: bool = False
    operator: Operator | None = None

    @property
    def name(self) -> str:
        """What is said behind the name of a map."""
        if self.operator is not None:
            return present.implied_by(self.operator, difference=self.difference)
        first = "all keys" if self.recipe is None else self.recipe.label
        base = "all keys" if self.base is None else self.base.label
        return f"{first} − {base}" if self.difference else "" if self.recipe is None else f"under {first}"

    @property
    def recipes(self) -> tuple[Recipe | None, ...]:
        """Those whose attention it takes."""
        return (self.recipe, self.base) if self.difference else (self.recipe,)


def read_under(recipe: Recipe | None) -> bool:
    """Whether the attention of a recipe is what its attention method made while the prompt was read."""
    return recipe is not None and any(changes_reading(method) for method in _attention_methods(recipe))


def cost_of_entry(recipe: Recipe | None) -> int:
    """How long a score entry takes under a recipe; exact attention: 1."""
    return _RUNNING if recipe is not None and any(has_to_run(method) for method in _attention_methods(recipe)) else 1


def _attention_methods(recipe: Recipe) -> list[AttentionMethod]:
    return [method for method in recipe.family("attention") if isinstance(method, AttentionMethod)]


def remark(recipe: Recipe | None) -> str:
    """What has to be said beside an attention method's own map where KV methods stand beside it."""
    if recipe is None or not read_under(recipe):
        return ""
    kept = [method.key for method in recipe.family("kv") if method.key != "full"]
    if not kept:
        return ""
    reads = _attention_methods(recipe)[0].key
    return (
        f"The prompt is read under {reads} before {' and '.join(kept)} {'drop' if len(kept) > 1 else 'drops'} or "
        f"rounds anything: these are the weights of {reads} alone."
    )
