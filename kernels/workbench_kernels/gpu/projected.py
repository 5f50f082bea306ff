"""The newest row of each head, projected: a program each for its key and its value."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power
from workbench_kernels.rotary import Turns
from workbench_kernels.rows import Ragged

_DIRECTIONS = 16  # of the basis, at once


@triton.jit
def _projected(x, starts, lengths, basis, into, cos, sin, partner, first, rank, head,
               D: tl.constexpr, DP: tl.constexpr, RC: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    r, d = tl.arange(0, RC), tl.arange(0, DP)
    inside = d < D
    last = tl.load(lengths + head) - 1
    row = (tl.load(starts + head) + last).to(tl.int64) * D
    number = tl.load(x + row + d, mask=inside, other=0.0).to(tl.float32)
    other = d
    if TURNED:
        at = (tl.load(first) + last).to(tl.int64) * D + d
        c = tl.load(cos + at, mask=inside, other=1.0)
        s = tl.load(sin + at, mask=inside, other=0.0)
        other = tl.load(partner + d, mask=inside, other=0)
        beside = tl.load(x + row + other, mask=inside, other=0.0).to(tl.float32)
        number = (number * c - beside * s) / (c * c + s * s)
    out = tl.zeros([DP], tl.float32)
    beside = tl.zeros([DP], tl.float32)
    for begin in tl.range(0, rank, RC):
        line = (head.to(tl.int64) * rank + begin + r)[:, None] * D
        real = (begin + r < rank)[:, None] & inside[None, :]
        some = tl.load(basis + line + d[None, :], mask=real, other=0.0).to(tl.float32)
        size = tl.maximum(tl.sum(some * some, 1), 1e-37)
        share = (tl.sum(some * number[None, :], 1) / size).to(basis.dtype.element_ty).to(tl.float32)
        out += tl.sum(share[:, None] * some, 0)
        if TURNED:
            some = tl.load(basis + line + other[None, :], mask=real, other=0.0).to(tl.float32)
            beside += tl.sum(share[:, None] * some, 0)
    if TURNED:
        out = out * c + beside * s
    tl.store(into + row + d, out, mask=inside)


@triton.jit
def _project(
    keys, key_starts, key_lengths, key_basis, into_keys, key_rank, values, value_starts, value_lengths, value_basis,
    into_values, value_rank, cos, sin, partner, first,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, RC: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    if tl.program_id(1) == 0:
        _projected(keys, key_starts, key_lengths, key_basis, into_keys, cos, sin, partner, first, key_rank, head,
                   D, DP, RC, TURNED)  # fmt: skip
    else:
        _projected(values, value_starts, value_lengths, value_basis, into_values, cos, sin, partner, first, value_rank,
                   head, DV, DVP, RC, False)  # fmt: skip


def project_newest(
    keys: Ragged,
    values: Ragged,
    key_basis: Tensor,
    value_basis: Tensor,
    turns: Turns | None,
    first: Tensor,
    into_keys: Tensor,
    into_values: Tensor,
) -> None:
    """See `workbench_kernels.projected.project_newest`."""
    width, value_width = keys.data.shape[1], values.data.shape[1]
    key_basis, value_basis = key_basis.contiguous(), value_basis.contiguous()
    _project[(keys.starts.numel(), 2)](
        keys.data, keys.starts, keys.lengths, key_basis, into_keys, key_basis.shape[1],
        values.data, values.starts, values.lengths, value_basis, into_values, value_basis.shape[1],
        *((key_basis,) * 3 if turns is None else turns), first,
        D=width, DP=power(width), DV=value_width, DVP=power(value_width), RC=_DIRECTIONS, TURNED=turns is not None,
        num_warps=4,
    )  # fmt: skip
