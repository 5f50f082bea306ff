"""Where the parts of a model's decoder are, whatever its architecture calls them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from workbench.errors import NotApplicable


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's layers by name, in order; of a model for several kinds of input those that read text.

    They are the modules of the largest list in the decoder that has one for each layer of the config: `layers`, `h`,
    `blocks`. Raises NotApplicable where there is no such list.
    """
    source: Any = model
    config = source.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers"))
    counts = {count for count in named if isinstance(count, int)}
    decoder = source.get_decoder() if hasattr(source, "get_decoder") else model
    lists: dict[str, nn.ModuleList] = {}
    for root in (decoder, model):  # what some models call their decoder is a part of it, or the head
        inside = {id(module) for module in root.modules()}
        lists = lists or {
            name: module
            for name, module in model.named_modules()
            if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) in counts
        }
    if not lists:
        raise NotApplicable(
            f"{type(model).__name__} has no list of {' or '.join(map(str, sorted(counts))) or 'its'} decoder layers: "
            "what looks at one layer after another does not work with it"
        )
    name = max(lists, key=lambda name: sum(weight.numel() for weight in lists[name].parameters()))
    return {f"{name}.{index}": layer for index, layer in enumerate(lists[name])}


def placed(name: str, layers: Iterable[str]) -> tuple[int | None, str]:
    """Where a module is: the number of its layer and its name inside that; None and its name outside all of them.

    layers: names of the decoder's layers.
    """
    for index, layer in enumerate(layers):
        if name.startswith(f"{layer}."):
            return index, name.removeprefix(f"{layer}.")
    return None, name
