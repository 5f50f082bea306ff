"""A model's linear layers, plain and compressed alike."""

from __future__ import annotations

from torch import nn

from workbench.models.linear import linear_of
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
