"""Triton kernels on tensors in host memory: under Triton's interpreter or, where there is a GPU, compiled for it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

interpreted = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


class _There:
    """Copies on the GPU of what a kernel is given: one of each storage, so that tensors that share one still do."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def moved(self, value: Any) -> Any:
        """A tensor in host memory, or a descriptor of one, as the same tensor on the GPU; anything else as it is."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        if isinstance(value, TensorDescriptor):
            return TensorDescriptor(self.moved(value.base), value.shape, value.strides, value.block_shape)
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return value
        held = torch.tensor([], dtype=value.dtype).set_(value.untyped_storage())
        _, there = self._copies.setdefault(held.data_ptr(), (held, held.cuda()))
        return there.view(value.dtype).as_strided(value.size(), value.stride(), value.storage_offset())

    def back(self) -> None:
        """What the kernel wrote, into host memory."""
        for held, there in self._copies.values():
            held.copy_(there)


def _run_on_the_gpu() -> None:
    """Let kernels take tensors in host memory, as the interpreter does."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def moved(self: Any, *args: Any, **options: Any) -> Any:
        there = _There()
        found = run(self, *map(there.moved, args), **{name: there.moved(value) for name, value in options.items()})
        there.back()
        return found

    JITFunction.run = moved


# Read when a kernel is decorated, so set before any of ours is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
elif find_spec("triton") is not None:
    _run_on_the_gpu()
