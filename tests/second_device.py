"""A second device on a machine that has one: tensors that compute on the CPU, but say and hold that they lie elsewhere.

As on a GPU, an operation whose tensors lie on both devices raises RuntimeError; numbers (tensors without dimensions)
may come from the CPU, and copies go from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _DummyDeviceGuard
from transformers import PreTrainedModel

from workbench.models.decoder import decoder_layers

ELSEWHERE = torch.device("privateuseone", 0)  # torch's place for devices that are made in Python
_COPIES = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.copy.default,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
    torch.ops.aten.to.other,
}
_INDEXING = {  # indices may lie on the CPU
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class Elsewhere(Tensor):
    """A tensor on the second device, held by one on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        with torch.inference_mode(False):  # views of it are made in and out of that mode
            made = Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=ELSEWHERE
            )
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["inner"])

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __getitem__(self, where: Any) -> Any:
        return super().__getitem__(_listed(where))

    def __setitem__(self, where: Any, value: Any) -> None:
        super().__setitem__(_listed(where), value)

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _listed(where: Any) -> Any:
    """An index with tensors in place of lists, of which torch makes tensors by itself."""
    if isinstance(where, tuple):
        return tuple(_listed(part) for part in where)
    return Elsewhere(torch.tensor(where)) if isinstance(where, list) else where


def _inner(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, tree)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim and not x.is_meta]
    if func in _INDEXING:
        here = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim]
    if there and here and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {ELSEWHERE} and cpu")
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    stays = asked is None or asked.type == ELSEWHERE.type
    result_there = bool(there) and stays if asked is None else asked.type == ELSEWHERE.type
    if func is torch.ops.aten.copy_.default:
        result_there = isinstance(args[0], Elsewhere)
    if func is torch.ops.aten.to.other:
        result_there = isinstance(args[1], Elsewhere)
    if func is torch.ops.aten.to.device:
        result_there, args = torch.device(args[1]).type == ELSEWHERE.type, (args[0], torch.device("cpu"), *args[2:])
    if asked is not None and asked.type == ELSEWHERE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(x.inner): x for x in there}
    args, kwargs = _inner((args, kwargs))
    result = func(*args, **kwargs)
    moved = bool(there) != result_there

    def wrapped(x: Any) -> Any:
        if type(x) not in (Tensor, nn.Parameter):  # masks without data stay what they are
            return x
        if id(x) in wrappers and not moved:
            return wrappers[id(x)]
        if moved and tensors and func in _COPIES:
            x = x.clone()
        return Elsewhere(x) if result_there and not x.is_meta else x

    return tree_map(wrapped, result)


class _Factories(TorchDispatchMode):
    """Makes tensors elsewhere where they are asked for there."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` allocates before a dispatch mode sees it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return Elsewhere(args[0].inner.new_tensor(*args[1:], **kwargs))
        asked = kwargs.get("device") if func in (torch.tensor, torch.as_tensor) else None
        if asked is None or torch.device(asked).type != ELSEWHERE.type:
            return func(*args, **kwargs)
        return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))


@cache
def _registered() -> None:
    """Let operations look for the device: once a process, for torch keeps it."""
    torch._register_device_module("privateuseone", _DummyBackendModule())
    torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Until the block ends there is the device that it gives."""
    _registered()
    with _Literals(), _Factories():
        yield ELSEWHERE


def move(module: nn.Module) -> None:
    """Put a module's weights and buffers on the second device."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None and not isinstance(weight, Elsewhere):
                part._parameters[name] = nn.Parameter(Elsewhere(weight.data), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and not isinstance(buffer, Elsewhere):
                part._buffers[name] = Elsewhere(buffer)


def divided(model: PreTrainedModel) -> PreTrainedModel:
    """The model, changed: the second half of its layers and its norm lie elsewhere, as accelerate would dispatch it."""
    layers = list(decoder_layers(model).values())
    there = {id(module) for module in (*layers[len(layers) // 2 :], model.model.norm)}
    for module in (model.get_input_embeddings(), *layers, model.model.norm, model.get_output_embeddings()):
        if id(module) in there:
            move(module)
        device = ELSEWHERE if id(module) in there else torch.device("cpu")
        add_hook_to_module(module, AlignDevicesHook(device, skip_keys="past_key_values"))
    return model
