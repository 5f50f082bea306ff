"""The kernel for what `workbench_kernels.fetching` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_NUMBERS = 2048  # words that a program moves at once


@triton.jit
def _fetch(data, at, out, count, W: tl.constexpr, WP: tl.constexpr, R: tl.constexpr):
    """R rows of W words."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    word = tl.arange(0, WP)
    there = row < count
    number = tl.load(at + row, mask=there, other=-1)
    inside = (word < W)[None, :]
    found = tl.load(data + number[:, None] * W + word[None, :], mask=(number >= 0)[:, None] & inside, other=0)
    tl.store(out + row.to(tl.int64)[:, None] * W + word[None, :], found, mask=there[:, None] & inside)


def fetch_rows(data: Tensor, at: Tensor) -> Tensor:
    """See `workbench_kernels.fetching.fetch_rows`."""
    out = torch.empty(*at.shape, data.shape[1], dtype=data.dtype, device=at.device)
    nbytes = data.shape[1] * data.itemsize
    if not out.numel():
        return out
    size = next(size for size in _WORDS if nbytes % size == 0)
    words = nbytes // size
    padded = power(words)
    rows = max(_NUMBERS // padded, 1)
    count = at.numel()
    _fetch[(-(-count // rows),)](
        data.view(_WORDS[size]), at.contiguous(), out.view(_WORDS[size]), count, W=words, WP=padded, R=rows, num_warps=4
    )  # fmt: skip
    return out
