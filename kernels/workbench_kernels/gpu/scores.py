"""What the Triton kernels that read attention share: scores of a tile, exponentials, and how tensors have to lie."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

LOG2E = 1.4426950408889634


# 2 ** x = 2 ** i * 2 ** f with f in [-1/2, 1/2]: adding 1.5 * 2 ** 23 rounds to the integer, whose bits then stand at
# the end of the sum, and are shifted into the exponent. The polynomial of degree 4 is off by 2.6e-6 at most.
_POLYNOMIAL = """{{
    .reg .f32 t, f, y;
    .reg .b32 i, j;
    max.f32 f, {x}, 0fC2FC0000;
    add.rn.f32 t, f, 0f4B400000;
    mov.b32 i, t;
    add.rn.f32 t, t, 0fCB400000;
    sub.rn.f32 f, f, t;
    fma.rn.f32 y, f, 0f{c4}, 0f{c3};
    fma.rn.f32 y, y, f, 0f{c2};
    fma.rn.f32 y, y, f, 0f{c1};
    fma.rn.f32 y, y, f, 0f{c0};
    shl.b32 i, i, 23;
    mov.b32 j, y;
    add.s32 {y}, j, i;
}}"""
_COEFFICIENTS = {"c0": "3F7FFFF4", "c1": "3F31706E", "c2": "3E76036D", "c3": "3D650A20", "c4": "3C1CCBEA"}


def _assembly(polynomial: int) -> str:
    """PTX for four exponentials, `polynomial` of them as polynomials."""
    lines = []
    for at in range(4):
        if at < polynomial:
            lines.append(_POLYNOMIAL.format(x=f"${4 + at}", y=f"${at}", **_COEFFICIENTS))
        else:
            lines.append(f"ex2.approx.ftz.f32 ${at}, ${4 + at};")
    return "\n".join(lines)


_EXP2_0, _EXP2_1, _EXP2_2 = (tl.constexpr(_assembly(share)) for share in range(3))
_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r,r,r")


@triton.jit
def exp2(x, POLYNOMIAL: tl.constexpr, INTERPRET: tl.constexpr):
    """2 ** x; POLYNOMIAL: how many of four are polynomials on the multiply-add units."""
    if INTERPRET:
        if POLYNOMIAL == 0:
            return tl.exp2(x)
        x = tl.maximum(x, -126.0)
        i = tl.floor(x + 0.5)
        f = x - i
        y = ((0.009570101276040077 * f + 0.05591785907745361) * f + 0.240247443318367) * f
        y = (y + 0.6931217908859253) * f + 0.9999992847442627
        return y * tl.exp2(i)
    if POLYNOMIAL == 0:
        y = tl.inline_asm_elementwise(_EXP2_0, _CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=4)
    elif POLYNOMIAL == 1:
        y = tl.inline_asm_elementwise(_EXP2_1, _CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=4)
    else:
        y = tl.inline_asm_elementwise(_EXP2_2, _CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=4)
    return y


@triton.jit
def scores(q, k_t, factor, cap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Scores times log2(e): products times `factor`, or cap * tanh(products * factor)."""
    if INTERPRET:  # which multiplies the bits of bfloat16 as integers
        q = q.to(tl.float32)
        k_t = k_t.to(tl.float32)
    s = tl.dot(q, k_t, input_precision=PRECISION)
    if SOFTCAP:
        e = exp2(tl.minimum(s * (2 * factor * 1.4426950408889634), 80.0), 0, INTERPRET)
        return cap * ((e - 1.0) / (e + 1.0))
    return s * factor


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted and not compiled."""
    return isinstance(exp2, InterpretedFunction)


def aligned(x: Tensor) -> Tensor:
    """As the copy units of a Hopper GPU want it: the last dimension contiguous, all else at multiples of 16 bytes.

    The queries and keys of a model are so already; others are copied.
    """
    step = 16 // x.element_size()
    if x.shape[2] % step:
        x = torch.nn.functional.pad(x, (0, step - x.shape[2] % step))
    fits = x.stride(2) == 1 and x.stride(0) % step == 0 and x.stride(1) % step == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()
