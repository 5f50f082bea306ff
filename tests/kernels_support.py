"""Triton kernels without a GPU: tests run them under Triton's interpreter, on tensors in host memory."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# Read when a kernel is decorated, so set before any of ours is imported. A machine with a GPU runs them there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

interpreted = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
