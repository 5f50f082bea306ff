"""The small operations between the matrix products of a decode step, fused: one token, a decoder layer at a time.

Each rounds where the separate operations of transformers' Llama family round, so results are theirs to the bit but for
the order of one sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rotary import rotate


def _takes_norm(x: Tensor, weight: Tensor) -> bool:
    return on_gpu(x, weight)


@with_kernel("gpu.step:add_rms_norm", when=_takes_norm)
def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [n, w], to which residual [n, w] is added first, and that divided by its root mean square, times weight [w].

    Returns (sum, normalised), both in the dtype of x (Zhang & Sennrich 2019, arXiv:1910.07467).
    """
    total = x if residual is None else residual + x
    exact = total.float()
    normalised = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normalised.to(x.dtype)


def _takes_rows(query: Tensor, keys: Tensor) -> bool:
    return on_gpu(query, keys)


@with_kernel("gpu.step:rotate_append", when=_takes_rows)
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
    keys.index_copy_(0, key_ends, rotate(key, cos, sin).to(keys.dtype))
    values.index_copy_(0, value_ends, value.to(values.dtype))
    return rotate(query, cos, sin)


def _takes_gate(gate: Tensor, up: Tensor) -> bool:
    return on_gpu(gate, up)


@with_kernel("gpu.step:silu_times", when=_takes_gate)
def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """gate / (1 + exp(-gate)) * up, for tensors of one shape (SwiGLU's, Shazeer 2020, arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up
