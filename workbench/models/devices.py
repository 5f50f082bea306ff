"""A model over several devices: where its layers compute, and weights that lie elsewhere between passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from workbench.engine.attention_hook import brought_to, computes_on, device_of, rests_elsewhere
from workbench.errors import ModelNotFound, NotApplicable
from workbench.models.decoder import decoder_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each decoder layer computes, by its number."""
    try:
        layers = decoder_layers(model).values()
    except NotApplicable:  # an architecture whose layers are not in one list
        return [device_of(model)] * int(model.config.get_text_config().num_hidden_layers)
    return [computes_on(layer) or device_of(model) for layer in layers]


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight with its name, brought from host memory or disk while it is looked at."""
    from accelerate.utils import align_module_device

    for name, module in model.named_modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            with align_module_device(module, execution_device="cpu"):
                yield from module.named_parameters(prefix=name, recurse=False)
        else:
            yield from module.named_parameters(prefix=name, recurse=False)


def check_data(model: nn.Module) -> None:
    """Raise ModelNotFound where weights are without data and nothing brings them."""
    for module in model.modules():
        if brought_to(module) is None and any(weight.is_meta for weight in module.parameters(recurse=False)):
            raise ModelNotFound(f"{type(model).__name__} has weights without data (on the meta device): load it whole")


def check_changeable(model: nn.Module) -> None:
    """Raise NotApplicable where weights lie elsewhere between passes, so that no method can change them."""
    if rests_elsewhere(model):
        raise NotApplicable(
            f"{type(model).__name__} has weights in host memory or on disk that come for each pass, which weight "
            "methods cannot change; give the devices more room (max_memory), or compress the model on the CPU, export "
            "it, and load that"
        )
