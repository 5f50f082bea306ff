"""Which attention of prompts kernels read, and whether of all their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.attention_rows import token_positions
from workbench_kernels.dispatch import on_gpu

_WIDEST = 256  # the largest heads that the kernels take


def reads_whole(
    queries: Tensor, keys: Tensor, query_positions: Tensor | None = None, key_positions: Tensor | None = None
) -> bool:
    """Whether queries [h, nq, d] are those of the last of all keys [k, nk, d], none of which was evicted, on a GPU and
    in shapes and types that kernels take. Positions as in `workbench.core.attention_rows.row_blocks`.
    """
    if not _fit(queries, keys) or queries.shape[1] > keys.shape[1]:
        return False
    return is_whole(*token_positions(queries.shape[1], keys.shape[1], query_positions, key_positions))


def reads_kept(queries: Tensor, keys: Tensor, at: Tensor, held: Tensor) -> bool:
    """Whether queries [h, nq, d] stand one after another at positions [nq], on a GPU and in shapes and types that
    kernels take, whichever keys [k, nk, d] are left at positions held [k or 1, nk].
    """
    if not _fit(queries, keys) or len(held) not in (1, len(keys)):
        return False
    return torch.equal(at, torch.arange(int(at[0]), int(at[0]) + len(at)))


def is_whole(at: Tensor, held: Tensor) -> bool:
    """Whether keys at positions [k or 1, nk] are all that there are, and queries at [nq] those of the last."""
    every = torch.arange(held.shape[1])
    return len(held) == 1 and torch.equal(held[0], every) and torch.equal(at, every[held.shape[1] - len(at) :])


def _fit(queries: Tensor, keys: Tensor) -> bool:
    if not on_gpu(queries, keys) or queries.ndim != 3 or keys.ndim != 3 or queries.dtype != keys.dtype:
        return False
    (h, nq, d), (k, nk, width) = queries.shape, keys.shape
    sizes = nq > 0 and nk > 0 and k > 0 and h > 0 and h % k == 0 and d == width <= _WIDEST
    return sizes and queries.dtype in (torch.float32, torch.float16, torch.bfloat16)
