"""Attention over a few rows more, joined to attention over others."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rotary import Turn, rotate
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_state, merge_states


def _takes(query: Tensor, keys: Tensor, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, keys) and query.dtype == keys.dtype and keys.shape[1] <= 256


@with_kernel("gpu.joined:joined", when=_takes)
def joined(
    out: Tensor, lse: Tensor, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, turn: Turn | None = None
) -> Tensor:
    """Attention of query [h, 1, d] over all that gave out [h, 1, dv] and its log-sum-exp float32 [h, 1], and over rows
    keys [k, s, d] and values [k, s, dv] besides, for which the query is turned first. Sinks of the scoring are not
    looked at: `out` has them.
    """
    if turn is not None:
        cos, sin = (x.index_select(0, turn.number) for x in (turn.cos, turn.sin))
        query = rotate(query.float(), cos, sin).to(query.dtype)
    seen = torch.ones(1, 1, keys.shape[1], dtype=torch.bool, device=query.device)
    return merge_states([(out, lse), attention_state(query, keys, values, seen, scoring.without_sinks())])
