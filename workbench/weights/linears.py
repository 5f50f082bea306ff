"""A model's linear layers, plain and compressed alike."""

from __future__ import annotations

from torch import nn

from workbench.weights.layers import CompactLinear


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, in order; of a compressed one made of several only the whole."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, nn.Linear | CompactLinear):
            found[name] = module
            inside = (*inside, f"{name}.")
    return found
