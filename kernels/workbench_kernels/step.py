"""The small operations between the matrix products of a decode step, fused: one token, a decoder layer at a time.

Each rounds where the separate operations of transformers' Llama family round, so results are theirs to the bit but for
the order of one sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [n, w], to which residual [n, w] is added first, and that divided by its root mean square, times weight [w].

    Returns (sum, normalised), both in the dtype of x (Zhang & Sennrich 2019, arXiv:1910.07467).
    """
    if on_gpu(x, weight):
        from workbench_kernels.gpu.step import add_rms_norm as kernel

        return kernel(x, weight, eps, residual)
    return add_rms_norm_reference(x, weight, eps, residual)


def add_rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = x if residual is None else residual + x
    exact = total.float()
    normalised = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normalised.to(x.dtype)


def rotate_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    key_ends: Tensor,
    values: Tensor,
    value_ends: Tensor,
) -> Tensor:
    """Turn query [h, d] and key [k, d] by the rotary angles of their position, cos and sin [d], in halves (Su et al.
    2021, arXiv:2104.09864), and write the key and value [k, dv] of head i to row key_ends[i] of keys [t, d] and row
    value_ends[i] of values [t', dv]; ends int64 [k] on the device.

    Returns the turned query [h, d].
    """
    if on_gpu(query, keys):
        from workbench_kernels.gpu.step import rotate_append as kernel

        return kernel(query, key, value, cos, sin, keys, key_ends, values, value_ends)
    return rotate_append_reference(query, key, value, cos, sin, keys, key_ends, values, value_ends)


def rotate_append_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    key_ends: Tensor,
    values: Tensor,
    value_ends: Tensor,
) -> Tensor:
    """`rotate_append` in plain PyTorch."""
    keys.index_copy_(0, key_ends, _turned(key, cos, sin).to(keys.dtype))
    values.index_copy_(0, value_ends, value.to(values.dtype))
    return _turned(query, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up, for tensors of one shape (SwiGLU's, Shazeer 2020, arXiv:2002.05202)."""
    if on_gpu(gate, up):
        from workbench_kernels.gpu.step import silu_times as kernel

        return kernel(gate, up)
    return silu_times_reference(gate, up)


def silu_times_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_times` in plain PyTorch."""
    return torch.nn.functional.silu(gate) * up
