"""Whether a kernel or its plain PyTorch reference computes."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


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
