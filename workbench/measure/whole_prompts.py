"""When kernels read the attention of a prompt as a whole."""

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
    if not on_gpu(queries, keys) or queries.ndim != 3 or keys.ndim != 3 or queries.dtype != keys.dtype:
        return False
    (h, nq, d), (k, nk, width) = queries.shape, keys.shape
    fits = 0 < nq <= nk and k > 0 and h > 0 and h % k == 0 and d == width <= _WIDEST
    if not fits or queries.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    at, held = token_positions(nq, nk, query_positions, key_positions)
    return len(held) == 1 and torch.equal(held[0], torch.arange(nk)) and torch.equal(at, held[0, nk - nq :])
