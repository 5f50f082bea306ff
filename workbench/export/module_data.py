"""The modules that stand in a compressed model in place of the original's, as plain data; rebuilt without running any
code but their own class's.
"""

# ruff: noqa: SLF001  only there do modules say which children, parameters and buffers they have that are None

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import CheckpointRefused, NotApplicable
from workbench.registry import registered
from workbench.weights.surgery.replaced import submodule_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INTERNAL = frozenset(vars(nn.Module()))
_PLAIN = "torch.nn.modules."  # where torch's own layers live
_MOVED = {  # classes under the paths that folders written by earlier versions name
    "workbench.weights.coreinfer:CoreMLP": "workbench.weights.layers.core_mlp:CoreMLP",
    "workbench.weights.low_rank:LowRankLinear": "workbench.weights.layers.low_rank:LowRankLinear",
    "workbench.weights.low_rank:StreamedMLP": "workbench.weights.layers.streamed_mlp:StreamedMLP",
    "workbench.weights.narrow:NarrowAttention": "workbench.weights.layers.narrow_attention:NarrowAttention",
}


# -- writing


def describe(twin: PreTrainedModel, skeleton: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What has to be put into a plain model of the same configuration to make it `twin`: modules by name, and tensors.

    The tensors are all that the twin holds: parameters, buffers, and tensors that are attributes of its own modules.
    Raises NotApplicable, naming the module, for what is no plain data.
    """
    tensors = {name: tensor.detach() for name, tensor in _tensors(twin)}
    modules = {name: _module(twin, skeleton, name, tensors) for name in _differing(twin, skeleton)}
    return modules, tensors


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _differing(twin: nn.Module, skeleton: nn.Module, name: str = "") -> Iterator[str]:
    module, plain = twin.get_submodule(name), submodule_at(skeleton, name)
    if plain is None or not _alike(module, plain):
        yield name
        return
    for child in module._modules:
        if module._modules[child] is not None:
            yield from _differing(twin, skeleton, f"{name}.{child}" if name else child)


def _alike(module: nn.Module, plain: nn.Module) -> bool:
    """Whether filling the plain module's tensors makes it this one, but for their children."""

    def shapes(of: nn.Module) -> dict[str, tuple[int, ...] | None]:
        tensors = {**of._parameters, **of._buffers}
        return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}

    children = [{name for name, child in of._modules.items() if child is not None} for of in (module, plain)]
    return type(module) is type(plain) and shapes(module) == shapes(plain) and children[0] == children[1]


def _module(twin: PreTrainedModel, skeleton: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    module, plain = twin.get_submodule(name), submodule_at(skeleton, name)
    if plain is not None and not any(_differing(twin, skeleton, name)):
        return {"plain": True}  # the skeleton has it
    cls = type(module)
    _class(cls.__module__, cls.__qualname__, name, NotApplicable)
    attributes = {}
    for key, value in vars(module).items():
        if key not in _INTERNAL:
            attributes[key] = _value(twin, value, f"{name}.{key}", tensors)
    children = {
        key: None if child is None else _module(twin, skeleton, f"{name}.{key}", tensors)
        for key, child in module._modules.items()
    }
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "attributes": attributes,
        "parameters": {key: tensor is not None for key, tensor in module._parameters.items()},
        "buffers": {key: tensor is not None for key, tensor in module._buffers.items()},
        "children": children,
    }


def _value(twin: PreTrainedModel, value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """An attribute as JSON takes it; what JSON has no form for is a list whose first item says what it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, *(_value(twin, item, f"{name}.{index}", tensors) for index, item in enumerate(value))]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _value(twin, item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return ["tensor", name]
    if value is twin.config or value is twin.config.get_text_config():
        return ["config"]
    raise NotApplicable(f"{name} is a {type(value).__name__}, which cannot be written as data: this cannot be exported")


# -- reading


def rebuild(skeleton: PreTrainedModel, modules: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make a plain model, whose parameters need not be there yet, the one that was described.

    Parameters of one name in `tensors` that are the same object stay one. Raises CheckpointRefused for what does not
    fit.
    """
    for name, described in modules.items():
        skeleton.set_submodule(name, _made(skeleton, name, described, tensors))
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        module = submodule_at(skeleton, path)
        if module is not None and key in module._parameters:
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = made[id(tensor)]
        elif module is not None and key in module._buffers:
            module._buffers[key] = tensor
    for name, tensor in _tensors(skeleton):
        if tensor.is_meta:
            raise CheckpointRefused(f"the weights lack {name}; export the model again")


def _made(skeleton: PreTrainedModel, name: str, described: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    if described.get("plain"):
        return skeleton.get_submodule(name)
    where, _, which = _MOVED.get(described["class"], described["class"]).partition(":")
    module = object.__new__(_class(where, which, name, CheckpointRefused))
    nn.Module.__init__(module)
    for key, value in described["attributes"].items():
        module.__dict__[key] = _read(skeleton, value, tensors)
    for key in described["parameters"]:
        module.register_parameter(key, None)
    for key in described["buffers"]:
        module.register_buffer(key, None)
    for key, child in described["children"].items():
        made = None if child is None else _made(skeleton, f"{name}.{key}", child, tensors)
        module.register_module(key, made)
    return module


def _read(skeleton: PreTrainedModel, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _read(skeleton, item, tensors) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind in ("list", "tuple"):
        read = [_read(skeleton, item, tensors) for item in items]
        return read if kind == "list" else tuple(read)
    if kind == "dtype":
        return getattr(torch, items[0])
    return tensors[items[0]] if kind == "tensor" else skeleton.config


def _class(where: str, which: str, name: str, refusal: type[Exception]) -> type[nn.Module]:
    """A module's class, if it is torch's own or comes with the workbench or a package that brings weight methods."""
    homes = {cls.__module__.partition(".")[0] for cls in registered("weights")}
    if where.startswith(_PLAIN) or where.partition(".")[0] in homes:
        cls = getattr(import_module(where), which, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls
    raise refusal(f"{name} is a {where}.{which}, which is no layer of a weight method that is installed here")
