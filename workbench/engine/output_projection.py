"""The weights with which layers write what their attention found, whatever the architecture calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_weight

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def output_projection(model: PreTrainedModel, layer: int, width: int) -> Tensor:
    """The weight [hidden, width] of the layer's output projection; width: of all its heads' outputs side by side.

    It is the last linear layer of the attention that takes so many numbers: every architecture makes its own after
    those of queries, keys and values. Raises NotApplicable where there is none, for instance where it was quantised.
    """
    module = list(decoder_layers(model).values())[layer]
    named = [(name, linear_weight(part)) for name, part in module.named_modules() if "att" in name.lower()]
    found = [weight for _, weight in named if weight is not None and weight.shape[1] == width]
    if not found:
        raise NotApplicable(
            f"layer {layer} has no plain output projection of {width} numbers: choose by scores alone, without what "
            "values write"
        )
    return found[-1]
