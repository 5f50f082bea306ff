"""The weights with which layers write what their attention found, whatever the architecture calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_weight

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out", "proj")


def output_projection(model: PreTrainedModel, layer: int, width: int) -> Tensor:
    """The weight [hidden, width] of the layer's output projection; width: of all its heads' outputs side by side.

    It is the attention's linear layer of that shape, by its name where queries are made by one of the same. Raises
    NotApplicable where there is none, for instance where it was quantised.
    """
    module = list(decoder_layers(model).values())[layer]
    shape = (model.config.get_text_config().hidden_size, width)
    named = {name: linear_weight(part) for name, part in module.named_modules() if "att" in name.lower()}
    fitting = {name: weight for name, weight in named.items() if weight is not None and weight.shape == shape}
    found = [weight for name, weight in fitting.items() if name.rsplit(".", 1)[-1] in _NAMES or len(fitting) == 1]
    if len(found) != 1:
        raise NotApplicable(
            f"layer {layer} has no plain output projection of {width} numbers: choose by scores alone, without what "
            "values write"
        )
    return found[0]
