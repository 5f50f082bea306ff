"""A linear layer that rounds its inputs and multiplies integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from workbench_kernels.dispatch import learning, on_gpu, with_kernel
from workbench_kernels.int_mm import int_mm, missing, widened
from workbench_kernels.limits import LEAST_STEP, WIDEST_ROUNDED

_EXACT = 1024  # columns whose products of 8-bit numbers float32 sums without rounding: 128 * 128 * 1024 = 2 ** 24


def _takes(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    fits = x.dtype.itemsize <= 4 and 0 < x.shape[1] <= WIDEST_ROUNDED
    return on_gpu(x, weight, scale, bias) and fits and not learning(x)


@with_kernel("gpu.integer:integer_linear", when=_takes)
def integer_linear(x: Tensor, weight: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """x [n, i], each token rounded to `bits` bits in steps of its own, times the transpose of weight int8 [o, i].

    Integers are multiplied and summed exactly, then times scale float32 [o], plus bias [o]: [n, o] in the dtype of x.
    """
    step = input_step(x, bits)
    sums = integer_product(input_codes(x, step, bits).to(torch.int8), weight)
    out = (sums * step * scale).to(x.dtype)
    return out if bias is None else out.add_(bias)


def input_step(x: Tensor, bits: int, profile: Tensor | None = None) -> Tensor:
    """The step by which inputs x [..., i] are rounded to `bits` bits: float32, [..., 1], or [..., i] with a profile.

    The largest |x| of each token over 2 ** (bits - 1) - 1. With `profile` [i], above zero, a token's steps are to each
    other as these numbers are, and the smallest such that reach all its inputs: the largest |x| / profile, times
    profile.
    """
    size = x.detach().float().abs()
    if profile is None:
        return _step(size.amax(dim=-1, keepdim=True), bits)
    profile = profile.float()
    return _step((size / profile).amax(dim=-1, keepdim=True) * profile, bits)


def cross_step(x: Tensor, bits: int, alpha: float) -> Tensor:
    """The step of inputs x [..., i] that are rounded together to `bits` bits: float32 [..., i].

    The largest |x| of its token to the power `alpha` times the largest of its column to the power 1 - alpha, over
    2 ** (bits - 1) - 1 (CrossQuant, Liu et al. 2024, arXiv:2410.07505).
    """
    size = x.detach().float().abs()
    column = size.flatten(0, -2).amax(dim=0)
    return _step(size.amax(dim=-1, keepdim=True).pow(alpha) * column.pow(1 - alpha), bits)


def _step(reach: Tensor, bits: int) -> Tensor:
    # Times the reciprocal, which is what a GPU makes of a division by a number: so steps are the same to the bit
    # everywhere, and ties, frequent at few bits of 16-bit inputs, fall to the same side.
    most: int = 2 ** (bits - 1) - 1
    return (reach * (1 / most)).clamp_min(LEAST_STEP)


def input_codes(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers of inputs x [..., i] in these steps, float32, from -(2 ** (bits - 1) - 1) up."""
    most = 2 ** (bits - 1) - 1
    return (x.float() / step).round_().clamp_(-most, most)


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [n, i] times weight int8 [o, i] transposed, exactly: float32 [n, o] where sums fit, else as near as it is.

    On a GPU by its integer units. Elsewhere by floating point, 1,024 columns at a time, whose sums float32 holds
    exactly: it is many times faster there than the integer product.
    """
    if x.device.type == "cuda":
        rows, outputs, columns = missing(x, weight)
        sums = int_mm(widened(x, rows, columns), widened(weight, outputs, columns))
        return sums[: x.shape[0], : weight.shape[0]].float()
    total: Tensor | None = None
    for inputs, weights in zip(x.split(_EXACT, dim=1), weight.split(_EXACT, dim=1), strict=True):
        sums = linear(inputs.float(), weights.float())
        total = sums if total is None else total.add_(sums)
    assert total is not None
    return total
