"""Hadamard matrices and the rotations made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_SMALL = 64  # the largest matrix of the doubling construction that is multiplied by at once
_LARGEST = 256  # of Paley's matrices, which have to be multiplied by as they are


def order(size: int) -> tuple[int, int]:
    """How vectors of `size` are rotated: in blocks of `base` times `power` numbers, power a power of two.

    base is the smallest of 1 and the orders that the constructions of Paley (1933) give with a prime, such that
    base * power == size: 576 = 36 * 16, 1536 = 12 * 128. Where there is none up to 256 (11008 = 43 * 256), base is 1
    and the rotation is block-diagonal: power is the largest power of two that divides `size`, and several blocks stand
    side by side.
    """
    power = size & -size
    odd = size // power
    if odd == 1:
        return 1, size
    for shift in range(2, power.bit_length()):  # orders of Hadamard matrices above 2 are multiples of 4
        base = odd << shift
        if base <= _LARGEST and _paley_prime(base) is not None:
            return base, power >> shift
    return 1, power


def whole(size: int) -> bool:
    """Whether one Hadamard matrix rotates all of `size` numbers together, rather than several blocks apart."""
    base, power = order(size)
    return base * power == size


def rotate(x: Tensor) -> Tensor:
    """The last axis of x [..., d] times an orthogonal Hadamard matrix (or blocks of them, see `order`), at its dtype.

    The matrix is symmetric only where d is a power of two: `unrotate` undoes it.
    """
    return _transform(x, forward=True)


def unrotate(x: Tensor) -> Tensor:
    """Undo `rotate`."""
    return _transform(x, forward=False)


def matrix(size: int) -> Tensor:
    """The matrix [d, d] that `rotate` multiplies by from the right, float64."""
    return rotate(torch.eye(size, dtype=torch.float64))


def _transform(x: Tensor, *, forward: bool) -> Tensor:
    base, power = order(x.shape[-1])
    shape = x.shape
    out = x.reshape(-1, base, power)
    if base > 1:
        left = _matrix_on(_paley, base, x.dtype, x.device)
        out = (left.T if forward else left) @ out
    done = 1
    while done < power:  # the doubling construction, a few doublings at a time: they commute
        part = min(_SMALL, power // done)
        out = (out.reshape(-1, part, done).transpose(1, 2) @ _matrix_on(_doubled, part, x.dtype, x.device)).transpose(
            1, 2
        )
        done *= part
    return (out.reshape(shape) / math.sqrt(base * power)).to(x.dtype)


@lru_cache
def _matrix_on(make: Callable[[int], Tensor], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix where it is needed: made once, for it is small."""
    with torch.inference_mode(False):
        return make(size).to(device, dtype)


def _doubled(size: int) -> Tensor:
    """Sylvester's matrix [d, d] of ones and minus ones, d a power of two."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _paley_prime(size: int) -> int | None:
    """The prime from which Paley's first (q + 1, q of the form 4 n + 3) or second construction (2 q + 2, q of the form
    4 n + 1) makes a matrix of this size; None: no prime does.
    """
    if size % 4 == 0 and _prime(size - 1):
        return size - 1
    half = size // 2 - 1
    return half if size % 4 == 0 and half % 4 == 1 and _prime(half) else None


def _prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _paley(size: int) -> Tensor:
    """Paley's Hadamard matrix [d, d] of ones and minus ones."""
    q = _paley_prime(size)
    assert q is not None
    squares = {number * number % q for number in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, q)]).double()
    places = torch.arange(q)
    jacobsthal = character[(places[:, None] - places) % q]  # [q, q]
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 1:] = 1, jacobsthal
    if q % 4 == 3:
        core[1:, 0] = -1
        return torch.eye(q + 1, dtype=torch.float64) + core
    core[1:, 0] = 1
    zero, other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    return torch.kron(torch.eye(q + 1, dtype=torch.float64), zero) + torch.kron(core, other)
