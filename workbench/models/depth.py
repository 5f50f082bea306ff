"""Which layers of a model hold keys and values, and which of them a shortened copy of it still has."""

from __future__ import annotations

from typing import Any

from torch import nn

from workbench.engine.states import attending
from workbench.errors import NotApplicable

_KEPT = "kept_layers"  # in a config: the numbers that a shortened model's layers had in the whole one


def origins(model: nn.Module) -> tuple[int, ...]:
    """For each layer that attends, the number that it had in the model from which this one was made; its own where none
    went.

    Traces, plans and stores count the layers that attend from zero; this is what they are called. Layers that keep
    another state than keys and values (linear attention, a state space, a convolution) are none of them.
    """
    numbers = _kept(model)
    return tuple(numbers[index] for index in attending(model))


def numbers_in(plain: nn.Module, model: nn.Module) -> tuple[int, ...]:
    """For each layer of `model` that attends, its number in `plain`, from which it was made."""
    known = dict(zip(origins(plain), attending(plain), strict=True))
    return tuple(known[origin] for origin in origins(model))


def _kept(model: nn.Module) -> tuple[int, ...]:
    """For each layer, whatever its kind, the number that it had in the whole model."""
    config: Any = model.config
    text = config.get_text_config()
    return tuple(getattr(text, _KEPT, None) or range(text.num_hidden_layers))


def renumber(model: nn.Module, kept: list[int]) -> None:
    """Write into a model's config that only the layers `kept`, ascending, are left of those that it had.

    Raises NotApplicable where the config derives its layers' kinds from their numbers, and can only name them all.
    """
    config: Any = model.config
    text, before = config.get_text_config(), _kept(model)
    kinds = getattr(text, "layer_types", None)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(before) and "layer" in name:
            setattr(text, name, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)
    setattr(text, _KEPT, [before[index] for index in kept])
    if kinds is not None and list(text.layer_types) != [kinds[index] for index in kept]:
        raise NotApplicable(
            f"the config of {type(model).__name__} derives the kinds of its layers from their numbers, so none can be "
            "left out"
        )
