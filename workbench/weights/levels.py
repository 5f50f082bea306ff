"""The levels at which a method can compress a layer: the same method with other bits, or other budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.budget import Budget
from workbench.errors import BadParameter, BudgetTooSmall
from workbench.registry import find
from workbench.weights.base import WeightMethod

_BITS = (2, 3, 4, 8)
_STEPS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # shares to choose from, beside the budget


class Profile(NamedTuple):
    """What the search chose: the level of each layer by name, and the divergence on its texts, before and after.

    before: with the same level everywhere, and what room was left filled at random.
    """

    levels: dict[str, str]
    before: float
    after: float


def levels_of(asker: str, of: str, levels: str, budget: Budget | None) -> tuple[WeightMethod, ...]:
    """A method at each level, in the order they are written.

    of: its key and parameters ("rtn group_size=32"). levels: bits ("2,3,4") of a method that has them, budgets of
    another; empty: 2, 3, 4 and 8 bits, or shares around `budget`. asker: the key that messages begin with. Raises
    BadParameter for what is no weight method, or none whose layers can be switched one by one.
    """
    key, *settings = of.split()
    cls = find(key)
    if not issubclass(cls, WeightMethod):
        raise BadParameter(f"{asker}: of={key!r} is no weight method that could compress single layers")
    values = dict(_setting(asker, text) for text in settings)
    written = [text.strip() for text in levels.split(",") if text.strip()]
    if "bits" in cls.model_fields:
        made = tuple(cls(**{**values, "bits": _number(level)}) for level in written or map(str, _BITS))
    else:
        made = tuple(cls(**{**values, "budget": _number(level)}) for level in written or _shares(budget))
    for method in made:
        if why := method.together or (method.every_size and "one copy of them has all sizes"):
            raise BadParameter(f"{asker}: the layers of {key} cannot be switched one by one: {why}")
    return made


def possible_levels(methods: Sequence[WeightMethod], linears: Mapping[str, nn.Linear]) -> list[WeightMethod]:
    """The levels that all these layers can have, smallest first. Raises what the last of them raised if none."""
    possible, refusal = [], None
    for method in methods:
        try:
            method.check(linears)
            possible.append(method)
        except BudgetTooSmall as error:
            refusal = error
    if not possible and refusal is not None:
        raise refusal
    return sorted(possible, key=lambda method: sum(method.nbytes(linear) for linear in linears.values()))


def sizes_of(methods: Sequence[WeightMethod], linears: Mapping[str, nn.Linear]) -> Tensor:
    """Bytes of each layer at each level, int64 [u, v]."""
    return torch.tensor([[method.nbytes(linear) for method in methods] for linear in linears.values()])


def level_name(method: WeightMethod) -> str:
    """A level as tables name it: its bits, or its budget."""
    bits = getattr(method, "bits", None)
    return f"{bits} bits" if bits is not None else str(method.effective_budget)


def _shares(budget: Budget | None) -> list[str]:
    middle = budget.amount if budget is not None and budget.kind == "share" else 0.5
    return [f"{middle + step:.4g}" for step in _STEPS if 0 < middle + step <= 1]


def _setting(asker: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name in ("bits", "budget"):
        raise BadParameter(f'{asker}: of takes a method and its parameters ("rtn group_size=32"), but not {text!r}')
    return name, _number(value)


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
