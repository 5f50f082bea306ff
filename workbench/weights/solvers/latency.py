"""How long products with weights of some shape take on this machine."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn.functional import linear

_REPEATS, _SECONDS = 15, 0.02  # each shape is tried so often, and not much longer than this


@cache
def product_seconds(outputs: int, inputs: int, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product of inputs [tokens, inputs] with a weight [outputs, inputs]; measured once a process.

    The median of several tries after one that is not counted, on the threads that torch has.
    """
    weight = torch.zeros(outputs, inputs, device=device, dtype=dtype)
    x = torch.zeros(tokens, inputs, device=device, dtype=dtype)
    seconds: list[float] = []
    began = time.perf_counter()
    with torch.inference_mode():
        while len(seconds) <= _REPEATS and (len(seconds) < 4 or time.perf_counter() - began < _SECONDS):
            start = time.perf_counter()
            linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]
