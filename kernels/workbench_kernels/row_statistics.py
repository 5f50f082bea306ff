"""Where each row of a layer's attention goes: how far back, how spread out, to which tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.attention_statistics import RowStatistics, before_each, check_statistics, score_blocks
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import log_sums


def _takes(query: Tensor, key: Tensor, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, key)


@with_kernel("gpu.row_statistics:row_statistics", when=_takes)
def row_statistics(
    query: Tensor,
    key: Tensor,
    scoring: Scoring,
    tokens: Tensor,
    *,
    early: int,
    recent: int,
    bins: int,
    held: Tensor | None = None,
) -> RowStatistics:
    """Entropies, distances and shares of all rows of all heads' causal attention, in one pass over Q K^T.

    query [h, n, d] and key [k, m, d] after the rotary embedding, h a multiple of k. scoring: as the layer attends.
    tokens: the ids of all positions of the text; the queries are those of the last n. held: where the keys stand, [m]
    or [k, m] ascending, where some were evicted; slots behind all of the text hold nothing. None: none was. early: how
    many first positions count as early; recent: how many last ones, the row's own included, `within` ends with; bins:
    how many powers of two it begins with, of which the last reaches the first position from the last one.

    Rows that see no key are all zeros, and their log-sum-exp is that of the sinks. Deterministic on any device.
    Memory: the results, and as much as `within` once more; in plain PyTorch, which computes in float32, or float64 if
    given that, a few blocks of rows. Raises ValueError for what does not fit together.
    """
    places = check_statistics(query, key, scoring, tokens, early, recent, bins, held)
    (h, n, _), (k, m, _) = query.shape, key.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    positions = torch.arange(m, device=device)[None] if places is None else places.to(device)
    at = torch.arange(len(tokens) - n, len(tokens), device=device)
    before = before_each(tokens, positions)  # [k or 1, m]
    lse, entropy, distance, first, follows = torch.empty(5, h, n, dtype=wide, device=device)
    within = torch.empty(h, bins + 1, n, dtype=wide, device=device)
    for block, scores in score_blocks(query, key, scoring, wide, at, positions):
        total = log_sums(scores, scoring)
        blind = total == -torch.inf
        logs = scores - total.masked_fill(blind, 0)
        probs = logs.exp().view(k, h // k, -1, m)
        behind = (at[block, None] - positions[:, None])[:, None]  # [k or 1, 1, r, m]
        match = (tokens[at[block], None] == before[:, None])[:, None] & (behind > 0)
        lse[:, block] = total[..., 0]
        entropy[:, block] = -(probs.view(h, -1, m) * logs.masked_fill_(logs == -torch.inf, 0)).sum(-1)
        distance[:, block] = (probs * behind).sum(-1).view(h, -1)
        first[:, block] = (probs * (positions < early)[:, None, None]).sum(-1).view(h, -1)
        follows[:, block] = (probs * match).sum(-1).view(h, -1)
        for place, bound in enumerate([*(1 << b for b in range(bins)), recent]):
            within[:, place, block] = (probs * (behind < bound)).sum(-1).view(h, -1)
    return RowStatistics(lse, entropy, distance, first, follows, within)
