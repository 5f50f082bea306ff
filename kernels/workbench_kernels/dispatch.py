"""Whether a kernel or its reference in plain PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import Parameter, signature
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

Args = tuple[object, ...]
Kwargs = Mapping[str, object]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class WithKernel(Protocol[P, R_co]):
    """A function that a kernel computes where it can, and its reference everywhere else."""

    @property
    def kernel(self) -> str:
        """The kernel's name, "module:function" in this package."""

    @property
    def reference(self) -> Callable[P, R_co]:
        """The same in plain PyTorch, wherever tensors lie; nothing is checked before."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """By the kernel or the reference."""


def with_kernel(
    kernel: str, *, when: Callable[..., bool], check: Callable[..., None] | None = None
) -> Callable[[Callable[P, R]], WithKernel[P, R]]:
    """Let a kernel compute what the decorated reference does in plain PyTorch, for arguments of which `when` is true.

    kernel: "module:function" in this package, with the reference's parameters, and perhaps some more behind them. It is
    reached by its name, as a plug-in is, and imported when it is wanted first: so references need neither Triton nor a
    GPU. when: is given those arguments that its parameters name. check: likewise; raises for what neither takes.
    Decorate a reference several times for several kernels: the outermost whose `when` is true computes.
    """
    module, _, name = kernel.partition(":")

    def decorated(function: Callable[P, R]) -> WithKernel[P, R]:
        checked = None if check is None else _given_by_name(check, function)
        taken = _given_by_name(when, function)

        @wraps(function)
        def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
            if checked is not None:
                checked(args, kwargs)
            if taken(args, kwargs):
                compute: Callable[P, R] = getattr(import_module(f"{__package__}.{module}"), name)
                return compute(*args, **kwargs)
            return function(*args, **kwargs)

        vars(dispatched).update(kernel=kernel, reference=getattr(function, "reference", function))
        return cast("WithKernel[P, R]", dispatched)

    return decorated


def _given_by_name(condition: Callable[..., R], function: Callable[..., object]) -> Callable[[Args, Kwargs], R]:
    """The condition as a function of what `function` is called with, of which it gets what its parameters name."""
    parameters = signature(function).parameters
    order = list(parameters)
    picks = [(order.index(name), name, parameters[name].default) for name in signature(condition).parameters]

    def asked(args: Args, kwargs: Kwargs) -> R:
        try:
            values = [
                args[place] if place < len(args) else kwargs[name] if default is Parameter.empty else
                kwargs.get(name, default) for place, name, default in picks
            ]  # fmt: skip
        except KeyError:
            signature(function).bind(*args, **kwargs)  # says what is missing
            raise
        return condition(*values)

    return asked


@cache
def triton_found() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether all of these tensors lie on a CUDA device and Triton is there to run kernels on them."""
    return all(x is None or x.is_cuda for x in tensors) and triton_found()


def learning(x: Tensor) -> bool:
    """Whether a gradient will be asked for, which kernels do not give."""
    return x.requires_grad and torch.is_grad_enabled()
