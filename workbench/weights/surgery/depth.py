"""Models with fewer blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.models.depth import renumber

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_depth(model: PreTrainedModel) -> None:
    """Raise NotApplicable where the model gives each block an input of its own: its tables are as wide as it has
    blocks.
    """
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise NotApplicable(f"{type(model).__name__} gives each block an input of its own, so none can be left out")


def shorten(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only the blocks `kept`, ascending, in a model that shares none of its modules with another.

    The others are gone, with their part of the cache; what is left counts from zero, as transformers' caches and the
    model's own code expect, and the config says where each layer came from. Raises NotApplicable as `check_depth` does.
    """
    check_depth(model)
    blocks = decoder_layers(model)
    staying = [list(blocks.values())[index] for index in kept]
    renumber(model, list(kept))
    for index, block in enumerate(staying):
        parts: list[Any] = list(block.modules())
        for part in parts:
            if getattr(part, "layer_idx", None) is not None:
                part.layer_idx = index
    model.set_submodule(next(iter(blocks)).rpartition(".")[0], nn.ModuleList(staying))
