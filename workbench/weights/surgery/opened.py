"""What one weight method made, as plain layers that another can compress further, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.weights.layers.factored import FactoredLinear
from workbench.weights.layers.low_rank import LowRankLinear
from workbench.weights.layers.masked import MaskedLinear
from workbench.weights.layers.sparse import SparseLinear
from workbench.weights.layers.streamed_mlp import StreamedMLP
from workbench.weights.surgery.sharing_copy import sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def opened(model: PreTrainedModel) -> PreTrainedModel:
    """A model that computes the same, with factors as plain layers and pruned weights as plain layers with zeros.

    The model itself where it has none of either.
    """
    return _replaced(model, lambda module: _open(module, model.dtype))


def closed(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose factors and pruned weights that are still plain are small again: undoes `opened`."""
    return _replaced(model, _close)


def _replaced(model: PreTrainedModel, make: Callable[[nn.Module], nn.Module | None]) -> PreTrainedModel:
    streamed = [f"{name}." for name, module in model.named_modules() if isinstance(module, StreamedMLP)]
    made = {
        name: new
        for name, module in model.named_modules()
        if not name.startswith(tuple(streamed)) and (new := make(module)) is not None  # it reads its factors itself
    }
    if not made:
        return model
    copy = sharing_copy(model)
    for name, module in made.items():
        copy.set_submodule(name, module)
    return copy


def _open(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    if type(module) is LowRankLinear:
        return FactoredLinear(_plain(module.down.to(dtype)), _plain(module.up.to(dtype)), module.bias)
    if type(module) is SparseLinear:
        return MaskedLinear(module.dequantised(dtype), module.kept, module.bias)
    return None


def _close(module: nn.Module) -> nn.Module | None:
    if type(module) is MaskedLinear:
        return SparseLinear(module.weight.detach(), module.kept, module.bias)
    if type(module) is FactoredLinear and type(module.down) is type(module.up) is nn.Linear:
        return LowRankLinear(module.down.weight.detach(), module.up.weight.detach(), module.bias)
    return None


def _plain(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear.eval()
