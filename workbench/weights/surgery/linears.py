"""A model's linear layers, plain and compressed alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from workbench.models.linear import linear_of, linear_weight
from workbench.weights.layers import CompactLinear


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, in order, as `linear_of` takes it; of a compressed one made of several the whole."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        linear = module if isinstance(module, CompactLinear) else linear_of(module)
        if linear is not None:
            found[name] = linear
            inside = (*inside, f"{name}.")
    return found


def weight_of(module: nn.Module, full: str = "weight") -> Tensor | None:
    """The whole weight that a module stands for, in float32 where it is held in another form; None: it has none."""
    if isinstance(module, CompactLinear):
        return module.dequantised()
    linear = linear_weight(module)
    if linear is not None:
        return linear
    for key in (full.rpartition(".")[2], "weight"):
        found = getattr(module, key, None)
        if isinstance(found, Tensor):
            return found
    return None


def used_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What makes the weight of each linear layer as it is used, by name."""
    return {name: partial(_used, module) for name, module in linear_layers(model).items()}


def _used(module: nn.Module) -> Tensor:
    weight = weight_of(module)
    assert weight is not None  # a linear layer has one
    return weight
