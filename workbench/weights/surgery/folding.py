"""Factors of a layer's inputs folded into what comes before it, which leaves what a block computes as it is."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from workbench.models.decoder import decoder_layers
from workbench.weights.surgery.rotation import known_norm, projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Fold(NamedTuple):
    """Layers that share an input, and what stands before them.

    before: a norm, or the linear layer whose last outputs they take channel by channel; within the block, by name like
    `layers`. inside: the module by whose output factors are judged; None: the one layer itself.
    """

    before: str
    layers: tuple[str, ...]
    inside: str | None


def folds(block: nn.Module) -> list[Fold]:
    """Where factors can be folded in a block of a known form, in the order in which its layers run; else nothing.

    Attention's output layer only where each head has values of its own: those that heads share cannot suit all of them.
    """
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    norms = ("input_layernorm", "post_attention_layernorm")
    if attention is None or mlp is None or not all(known_norm(getattr(block, norm, None)) for norm in norms):
        return []
    places = {place: projections(place, block.get_submodule(place)) for place in ("self_attn", "mlp")}
    names = [f"{place}.{name}" for place, found in places.items() for name in found]
    if any(type(_at(block, name)) is not nn.Linear for name in names):
        return []
    *reading, out = (f"self_attn.{name}" for name in places["self_attn"])
    *widening, down = (f"mlp.{name}" for name in places["mlp"])
    found = [Fold(norms[0], tuple(reading), "self_attn")]
    if block.get_submodule(reading[-1]).weight.shape == block.get_submodule(out).weight.shape:
        found.append(Fold(reading[-1], (out,), None))
    return [*found, Fold(norms[1], tuple(widening), "mlp"), Fold(widening[-1], (down,), None)]


def foldable(name: str, block: nn.Module, linears: Container[str]) -> list[Fold]:
    """`folds` of the block of this name, if all their layers are among `linears`; else nothing: a layer that stays
    plain has to keep its input.
    """
    places = folds(block)
    return places if all(f"{name}.{layer}" in linears for place in places for layer in place.layers) else []


def folded_layers(model: nn.Module, linears: Container[str]) -> dict[str, str]:
    """The layers of a model whose weights change where factors of these layers' inputs are folded, by name, and how."""
    blocks = decoder_layers(cast("PreTrainedModel", model)).items()
    found = [
        f"{name}.{layer}" for name, block in blocks for fold in foldable(name, block, linears) for layer in fold.layers
    ]
    return dict.fromkeys(found, "scales of its inputs are held by what is before it")


def fold(block: nn.Module, where: Fold, scales: Tensor) -> None:
    """Multiply the columns of the layers by scales [i], and divide what comes before them; no tensor is written to."""
    before = block.get_submodule(where.before)
    count = scales.numel()
    for key in ("weight", "bias"):
        part = getattr(before, key, None)
        if part is None:
            continue
        divided = part.detach().float()
        rows = scales if part.ndim == 1 else scales[:, None]
        divided = torch.cat([divided[:-count], divided[-count:] / rows])
        setattr(before, key, nn.Parameter(divided.to(part.dtype), requires_grad=False))
    for name in where.layers:
        layer: Any = block.get_submodule(name)
        layer.weight = nn.Parameter(
            (layer.weight.detach().float() * scales).to(layer.weight.dtype), requires_grad=False
        )


def _at(block: nn.Module, name: str) -> nn.Module | None:
    module: nn.Module | None = block
    for part in name.split("."):
        module = getattr(module, part, None)
    return module
