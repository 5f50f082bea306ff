"""Triton kernels for what `workbench_kernels.step` says. One token: what counts is the number of launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power

_PIECE = 1024  # numbers of a program that works number by number


@triton.jit
def _add_rms_norm(x, residual, weight, total, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    number = tl.load(x + row + column, mask=inside, other=0.0)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if ADD:
        before = tl.load(residual + row + column, mask=inside, other=0.0)
        number = (before.to(tl.float32) + number.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + row + column, number, mask=inside)
    exact = number.to(tl.float32)
    # As a division, which rounds like the reference's product with the reciprocal root to within an ulp of float32
    normalised = exact * (1.0 / tl.sqrt_rn(tl.sum(exact * exact, 0) / WIDTH + eps))
    rounded = normalised.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row + column, (scale.to(tl.float32) * rounded).to(out.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `workbench_kernels.step.add_rms_norm`."""
    x = x.contiguous()
    rows, width = x.shape
    total = x if residual is None else torch.empty_like(x)
    out = torch.empty_like(x)
    block = power(width)
    _add_rms_norm[(rows,)](
        x, x if residual is None else residual.contiguous(), weight, total, out, eps,
        WIDTH=width, BLOCK=block, ADD=residual is not None, num_warps=min(max(block // 256, 1), 16),
    )  # fmt: skip
    return total, out


@triton.jit
def _rotate_append(
    query, key, value, cos, sin, turned, keys, key_ends, values, value_ends,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One head: of the queries, then of the keys, then of the values."""
    head = tl.program_id(0)
    if head >= H + K:
        row = tl.load(value_ends + (head - H - K)) * DV
        each = tl.arange(0, DVP)
        number = tl.load(value + (head - H - K) * DV + each, mask=each < DV)
        tl.store(values + row + each, number.to(values.dtype.element_ty), mask=each < DV)
    else:
        channel = tl.arange(0, HALF)
        inside = channel < D // 2
        upper = channel + D // 2
        if head < H:
            source = query + head * D
        else:
            source = key + (head - H) * D
        kind = query.dtype.element_ty
        first = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + upper, mask=inside, other=0.0).to(tl.float32)
        # Each product is rounded before they are added, as separate operations would.
        a = (first * tl.load(cos + channel, mask=inside, other=0.0).to(tl.float32)).to(kind)
        b = (-second * tl.load(sin + channel, mask=inside, other=0.0).to(tl.float32)).to(kind)
        c = (second * tl.load(cos + upper, mask=inside, other=0.0).to(tl.float32)).to(kind)
        d = (first * tl.load(sin + upper, mask=inside, other=0.0).to(tl.float32)).to(kind)
        front = (a.to(tl.float32) + b.to(tl.float32)).to(kind)
        back = (c.to(tl.float32) + d.to(tl.float32)).to(kind)
        if head < H:
            tl.store(turned + head * D + channel, front, mask=inside)
            tl.store(turned + head * D + upper, back, mask=inside)
        else:
            place = tl.load(key_ends + (head - H)) * D
            tl.store(keys + place + channel, front.to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + place + upper, back.to(keys.dtype.element_ty), mask=inside)


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
    """See `workbench_kernels.step.rotate_append`."""
    (heads, width), (kv_heads, value_width) = query.shape, value.shape
    turned = torch.empty(heads, width, dtype=query.dtype, device=query.device)
    _rotate_append[(heads + 2 * kv_heads,)](
        query.contiguous(), key.contiguous(), value.contiguous(), cos.contiguous(), sin.contiguous(), turned,
        keys, key_ends, values, value_ends,
        H=heads, K=kv_heads, D=width, DV=value_width, HALF=power(width // 2), DVP=power(value_width), num_warps=1,
        enable_fp_fusion=False,  # products are rounded before they are added
    )  # fmt: skip
    return turned


@triton.jit
def _silu_times(gate, up, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    exact = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    bent = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (bent * other).to(out.dtype.element_ty), mask=inside)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """See `workbench_kernels.step.silu_times`."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _silu_times[(-(-out.numel() // _PIECE),)](
        gate.contiguous(), up.contiguous(), out, out.numel(), BLOCK=_PIECE, num_warps=4
    )
    return out
