"""Where each row of a layer's attention goes: how far back, how spread out, to which tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.attention_statistics import RowStatistics, check_statistics, score_blocks
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import log_sums


def _takes(query: Tensor, key: Tensor, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, key)


@with_kernel("gpu.row_statistics:row_statistics", when=_takes)
def row_statistics(
    query: Tensor, key: Tensor, scoring: Scoring, tokens: Tensor, *, early: int, recent: int, bins: int
) -> RowStatistics:
    """Entropies, distances and shares of all rows of all heads' causal attention, in one pass over Q K^T.

    query [h, n, d] and key [k, m, d] after the rotary embedding, h a multiple of k, n <= m: the queries are those of
    the last n keys. scoring: as the layer attends. tokens: the ids of the m positions, on the same device. early: how
    many first positions count as early; recent: how many last ones, the row's own included, `within` ends with; bins:
    how many powers of two it begins with, of which the last reaches the first key from the last row.

    Deterministic on any device. Memory: the results, and as much as `within` once more; in plain PyTorch, which
    computes in float32, or float64 if given that, a few blocks of rows. Raises ValueError for what does not fit
    together.
    """
    check_statistics(query, key, scoring, tokens, early, recent, bins)
    (h, n, _), m = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    at, held = torch.arange(m - n, m, device=device), torch.arange(m, device=device)
    before = torch.cat([tokens.new_full((1,), -1), tokens[:-1]])
    lse, entropy, distance, first, follows = torch.empty(5, h, n, dtype=wide, device=device)
    within = torch.empty(h, bins + 1, n, dtype=wide, device=device)
    for block, scores in score_blocks(query, key, scoring, wide):
        total = log_sums(scores, scoring)
        logs = scores - total
        probs = logs.exp()  # [h, r, m]
        behind = at[block, None] - held
        lse[:, block] = total[..., 0]
        entropy[:, block] = -(probs * logs.masked_fill_(probs == 0, 0)).sum(-1)
        distance[:, block] = (probs * behind).sum(-1)
        first[:, block] = probs[..., :early].sum(-1)
        follows[:, block] = (probs * ((tokens[at[block], None] == before) & (behind > 0) & (held > 0))).sum(-1)
        for place, bound in enumerate([*(1 << b for b in range(bins)), recent]):
            within[:, place, block] = (probs * (behind < bound)).sum(-1)
    return RowStatistics(lse, entropy, distance, first, follows, within)
