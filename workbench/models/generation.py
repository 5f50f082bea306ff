"""Generation configs that can be written: transformers refuses those with values that mean nothing together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def writable(config: GenerationConfig) -> tuple[GenerationConfig, tuple[str, ...]]:
    """A generation config that validates, and what had to change for that, each as "name=value"; often nothing.

    What is named in the complaint goes back to its default, one value after another, until there is no complaint left:
    a temperature without sampling, beams that stop early where there is one, or what is no number. These change nothing
    in what the model says, or would raise when it is asked. Token ids stay.
    """
    from transformers import GenerationConfig

    made, plain = copy.deepcopy(config), vars(GenerationConfig())
    changed: list[str] = []
    while (complaint := _complaint(made)) is not None:
        name = _culprit(made, complaint, plain)
        if name is None:  # none by itself: nothing but the ids is kept
            kept = {name: value for name in _IDS if isinstance(value := getattr(made, name, None), int | list)}
            return GenerationConfig(**kept), (*changed, "everything but token ids")
        changed.append(f"{name}={getattr(made, name)!r}")
        _reset(made, name, plain)
    return made, tuple(changed)


def _complaint(config: GenerationConfig) -> str | None:
    """What speaks against writing this config."""
    try:
        config.validate(strict=True)
        config.to_json_string()
    except (ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _culprit(config: GenerationConfig, complaint: str, plain: dict[str, object]) -> str | None:
    """Which value has to go for the complaint to go, or at least to change; those that it names first."""
    given = [
        name for name, value in vars(config).items() if not name.startswith("_") and not _alike(value, plain, name)
    ]
    given.sort(key=lambda name: (name in _IDS, f"`{name}`" not in complaint))
    better = None
    for name in given:
        trial = copy.copy(config)
        _reset(trial, name, plain)
        left = _complaint(trial)
        if left is None:
            return name
        if left != complaint and better is None:
            better = name
    return better


def _alike(value: object, plain: dict[str, object], name: str) -> bool:
    return name in plain and type(value) is type(plain[name]) and bool(value == plain[name])


def _reset(config: GenerationConfig, name: str, plain: dict[str, object]) -> None:
    if name in plain:
        setattr(config, name, plain[name])
    else:
        delattr(config, name)
