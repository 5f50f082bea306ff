"""A model's linear layers, plain and compressed alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of, linear_weight
from workbench.weights.layers import CompactLinear


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name, in order, as `linear_of` takes it; of a compressed one made of several the whole."""
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside or ("\0",)):
            continue
        linear = module if isinstance(module, CompactLinear) else linear_of(module)
        if linear is not None:
            layers[name] = linear
            inside = (*inside, f"{name}.")
    return layers


def weight_of(module: nn.Module, full: str = "weight") -> Tensor | None:
    """The whole weight that a module stands for, in float32 where it is held in another form; None: it has none."""
    if isinstance(module, CompactLinear):
        return module.dequantised()
    linear = linear_weight(module)
    if linear is not None:
        return linear
    for key in (full.rpartition(".")[2], "weight"):
        weight = getattr(module, key, None)
        if isinstance(weight, Tensor):
            return weight
    return None


def used_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What makes the weight of each linear layer as it is used, by name."""
    return {name: partial(_used, module) for name, module in linear_layers(model).items()}


def _used(module: nn.Module) -> Tensor:
    weight = weight_of(module)
    assert weight is not None  # a linear layer has one
    return weight


def output_head(model: nn.Module) -> nn.Module | None:
    """What turns the last hidden states into logits, in a model that has such a module."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def outside(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which of these layers stand in none of the decoder's layers, where calibration does not look, with the reason."""
    inside = tuple(f"{name}." for name in decoder_layers(model))
    return {name: "it stands outside the blocks that are calibrated" for name in names if not name.startswith(inside)}
