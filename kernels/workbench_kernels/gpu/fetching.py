"""The kernel for what `workbench_kernels.fetching` says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.gpu.split import power

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_NUMBERS = 2048  # words that a program moves at once
_WIDEST = 1024  # words of a row that one program moves; the width itself is no constant, for it may grow


@triton.jit
def _fetch(data, at, out, count, words, WP: tl.constexpr, R: tl.constexpr):
    """WP words of R rows that have `words`."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    word = tl.program_id(1) * WP + tl.arange(0, WP)
    there = row < count
    number = tl.load(at + row, mask=there, other=-1)
    inside = (word < words)[None, :]
    found = tl.load(data + number[:, None] * words + word[None, :], mask=(number >= 0)[:, None] & inside, other=0)
    tl.store(out + row.to(tl.int64)[:, None] * words + word[None, :], found, mask=there[:, None] & inside)


def fetch_rows(data: Tensor, at: Tensor) -> Tensor:
    """See `workbench_kernels.fetching.fetch_rows`."""
    out = torch.empty(*at.shape, data.shape[1], dtype=data.dtype, device=at.device)
    nbytes = data.shape[1] * data.itemsize
    if not out.numel():
        return out
    size = next(size for size in _WORDS if nbytes % size == 0)
    words = nbytes // size
    padded = min(power(words), _WIDEST)
    rows, count = max(_NUMBERS // padded, 1), at.numel()
    _fetch[(-(-count // rows), -(-words // padded))](
        data.view(_WORDS[size]), at.contiguous(), out.view(_WORDS[size]), count, words, WP=padded, R=rows, num_warps=4
    )
    return out
