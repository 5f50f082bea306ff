"""Whether a kernel or its plain PyTorch reference computes."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def triton_found() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def on_gpu(*tensors: Tensor | None) -> bool:
    """Whether all of these tensors lie on a CUDA device and Triton is there to run kernels on them."""
    return all(x is None or x.is_cuda for x in tensors) and triton_found()
