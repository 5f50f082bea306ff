"""What each weight method of a recipe does, and in which order several of them are applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, get_args

from workbench.errors import BadRecipe
from workbench.weights.base import Stage, WeightMethod

STAGES: tuple[Stage, ...] = get_args(Stage)
_DOES = {
    "structure": "make modules smaller",
    "transform": "transform the weights",
    "factor": "replace weights by products",
    "select": "choose which weights stay",
    "round": "choose how weights are held",
    "activations": "round what enters the layers",
}
_ONCE = ("transform", "factor", "select", "activations")  # structures add up; rounding methods may take other layers

M = TypeVar("M", bound=WeightMethod)


def ordered(methods: Sequence[M]) -> tuple[M, ...]:
    """Weight methods in the order of their stages, in which they are applied; those of one stage as they were given.

    Modules become smaller first, then weights are transformed, replaced by products, left out, and rounded; last what
    enters the layers is rounded. Each method is given what those before it left: factors and pruned weights as plain
    layers. Raises BadRecipe for two methods of one stage that cannot both be, and where one that rounds comes after a
    pruning one and does not know which weights to leave out.
    """
    found = tuple(sorted(methods, key=lambda method: STAGES.index(method.stage)))
    for stage in _ONCE:
        same = [method.key for method in found if method.stage == stage]
        if len(same) > 1:
            raise BadRecipe(f"{' and '.join(same)} both {_DOES[stage]}: use one of them")
    pruning = [method.key for method in found if method.stage == "select"]
    for method in found if pruning else ():
        if method.stage == "round" and not method.takes_pruned:
            raise BadRecipe(
                f"{method.key} would fill in what {pruning[0]} leaves out: after pruning, use a method that rounds "
                "only what stays, such as rtn or gptq"
            )
    return found


def clash(method: WeightMethod, before: Sequence[WeightMethod], why: str) -> BadRecipe:
    """What is wrong with a recipe where a method finds nothing left by those before it; why: in the survey's words."""
    same = [other.key for other in before if other.stage == method.stage]
    keys = " and ".join(same or [other.key for other in before])
    both = f": they both {_DOES[method.stage]}, use one of them" if same else ""
    return BadRecipe(f"{method.key} finds nothing to do behind {keys}{both} ({why})")
