"""Which layers of a model a shortened copy of it still has."""

from __future__ import annotations

from typing import Any

from torch import nn

_KEPT = "kept_layers"  # in a config: the numbers that a shortened model's layers had in the whole one


def origins(model: nn.Module) -> tuple[int, ...]:
    """For each layer the number that it had in the model from which this one was made; its own where none went."""
    config: Any = model.config
    text = config.get_text_config()
    return tuple(getattr(text, _KEPT, None) or range(text.num_hidden_layers))


def renumber(model: nn.Module, kept: list[int]) -> None:
    """Write into a model's config that only the layers `kept`, ascending, are left of those that it had."""
    config: Any = model.config
    text, before = config.get_text_config(), origins(model)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == len(before) and "layer" in name:
            setattr(text, name, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)
    setattr(text, _KEPT, [before[index] for index in kept])
