"""Kernels and their references: alike to callers, and taken by name where arguments allow."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench_kernels
from tests.kernels.support import interpreted
from workbench_kernels.dispatch import with_kernel
from workbench_kernels.step import silu_times


def dispatched() -> Iterator[Any]:
    """Every function that has a kernel, once for each that it has."""
    for module in iter_modules(workbench_kernels.__path__, "workbench_kernels."):
        for function in [] if module.ispkg else vars(import_module(module.name)).values():
            if isinstance(function, FunctionType) and function.__module__ == module.name:
                layer: Any = function
                while hasattr(layer, "kernel"):
                    yield layer
                    layer = layer.__wrapped__


@interpreted
@pytest.mark.parametrize("function", list(dispatched()), ids=lambda function: function.kernel)
def test_kernels_are_called_as_their_references_are(function: Any) -> None:
    module, _, name = function.kernel.partition(":")
    kernel = signature(getattr(import_module(f"workbench_kernels.{module}"), name)).parameters
    shared = list(signature(function.reference).parameters.values())
    assert [(each.name, each.kind, each.default) for each in list(kernel.values())[: len(shared)]] == [
        (each.name, each.kind, each.default) for each in shared
    ]
    assert all(each.default is not each.empty for each in list(kernel.values())[len(shared) :])


def test_conditions_are_given_what_they_name_however_it_is_passed() -> None:
    asked: list[Any] = []

    def when(c: int, a: int) -> bool:
        asked.append((c, a))
        return False

    def check(b: int) -> None:
        if b < 0:
            raise ValueError("negative")

    @with_kernel("gpu.nowhere:nothing", when=when, check=check)
    def total(a: int, b: int = 2, *, c: int = 3) -> int:
        """Of all."""
        return a + b + c

    assert (total(1), total(b=5, a=4), total(1, 2, c=9)) == (6, 12, 12)
    assert asked == [(3, 1), (3, 4), (9, 1)]
    assert total.__doc__ == "Of all."
    assert total.reference(1, -2) == 2
    with pytest.raises(ValueError, match="negative"):
        total(1, -2)
    with pytest.raises(TypeError, match="'a'"):
        total(b=1)


@interpreted
def test_the_kernel_computes_where_tensors_lie_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench_kernels.gpu import step

    calls: list[Tensor] = []
    monkeypatch.setattr(step, "silu_times", lambda gate, up: calls.append(gate) or up)
    gate, up = torch.ones(3), torch.full((3,), 2.0)
    assert not torch.equal(silu_times(gate, up), up) and not calls
    monkeypatch.setattr("workbench_kernels.step.on_gpu", lambda *tensors: True)
    assert torch.equal(silu_times(gate, up), up) and len(calls) == 1
