"""Which modules of a model are linear layers, whatever class they are of."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_CONV1D = "transformers.pytorch_utils"  # where GPT-2's layers come from: linear ones whose weight lies transposed
_CLOSE = 0.02  # of the largest output: how far rounding at 16 bits may take two ways of the same product apart


def linear_of(module: nn.Module) -> nn.Linear | None:
    """A module as a linear layer that shares its weight [o, i] and bias; None where it computes anything else.

    Subclasses count where they give the same numbers. A layer whose weight lies transposed (Conv1D) comes as one that
    looks at it from the other side: nothing is copied.
    """
    if type(module) is nn.Linear:
        return module
    if type(module).__module__ == _CONV1D and type(module).__name__ == "Conv1D":
        source: Any = module
        made = nn.Linear(source.weight.shape[0], source.weight.shape[1], bias=False, device="meta")
        made.weight = nn.Parameter(source.weight.T, requires_grad=False)
        made.register_parameter("bias", source.bias)
        return made.train(module.training)
    if isinstance(module, nn.Linear) and not type(module).__module__.startswith("torch."):
        return module if _same(module) else None
    return None


def linear_weight(module: nn.Module) -> Tensor | None:
    """The weight [o, i] of a linear layer, as `linear_of` takes it."""
    found = linear_of(module)
    return None if found is None else found.weight


def _same(module: nn.Linear) -> bool:
    """Whether a subclass of a linear layer computes what a linear layer does."""
    weight = module.weight
    if not weight.is_floating_point() or weight.is_meta or weight.shape != (module.out_features, module.in_features):
        return False
    x = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        want = nn.functional.linear(x, weight, module.bias)
        try:
            output = module(x)
        except Exception:  # noqa: BLE001  (a subclass may want anything, and fail in any way)
            return False
    if not isinstance(output, Tensor) or output.shape != want.shape:
        return False
    return bool((output - want).abs().max() <= _CLOSE * want.abs().max())


def wanted_weights(owner: nn.Module) -> frozenset[str]:
    """The linear layers whose weights a module reads itself, by name: it multiplies them instead of calling the layer,
    or calls it with inputs of the weight's dtype. Nothing can stand in their place.
    """
    return _wanted(type(owner).__module__, type(owner).__qualname__)


@cache
def _wanted(where: str, which: str) -> frozenset[str]:
    owner = getattr(sys.modules[where], which, None)
    try:
        source = "" if owner is None else inspect.getsource(owner)
    except OSError:  # written in no file
        return frozenset()
    found = re.findall(r"\bself\.(\w+)\.weight *@|@ *self\.(\w+)\.weight\b", source)
    named = {name for pair in found for name in pair if name}
    return frozenset(
        named.union(re.findall(r"\bself\.(\w+)\([^()]*\.to\((?:dtype=)?self\.\1\.weight\.dtype\)", source))
    )
