"""Which modules of a compressed copy are no longer those of the model."""

from __future__ import annotations

from torch import nn


def replaced(model: nn.Module, twin: nn.Module) -> list[str]:
    """Modules of a compressed copy that stand in another's place, or whose own tensors are not the model's; the
    outermost ones only.
    """
    names: list[str] = []
    for name, module in twin.named_modules():
        if any(name.startswith(f"{above}.") for above in names):
            continue
        before = submodule_at(model, name)
        if before is None or type(before) is not type(module) or _tensor_ids(before) != _tensor_ids(module):
            names.append(name)
    return names


def _tensor_ids(module: nn.Module) -> list[int]:
    return [id(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]


def submodule_at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; None where the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
