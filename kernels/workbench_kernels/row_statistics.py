"""Where each row of a layer's attention goes: how far back, how spread out, to which tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.attention_statistics import check_reading, score_blocks
from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import log_sums


class RowStatistics(NamedTuple):
    """What was read of each row, float32 unless said otherwise. With sinks, their share of a row is none of these."""

    lse: Tensor
    """[h, n] natural logarithm of the row's sum of exp(score), sinks included"""
    entropy: Tensor
    """[h, n] -sum P log P over the keys it sees, in nats"""
    distance: Tensor
    """[h, n] sum of P times how many positions the key stands behind the row"""
    early: Tensor
    """[h, n] share that goes to the first positions"""
    follows: Tensor
    """[h, n] share that goes to earlier keys that follow an occurrence of the row's own token"""
    within: Tensor
    """[h, bins + 1, n] share that goes less than 2 ** b positions back, b being 0 .. bins - 1; then `recent`"""


def _takes(query: Tensor, key: Tensor, scoring: Scoring) -> bool:
    return scoring.in_kernels and on_gpu(query, key)


def check_statistics(
    query: Tensor, key: Tensor, scoring: Scoring, tokens: Tensor, early: int, recent: int, bins: int
) -> None:
    """Raise ValueError for arguments of `row_statistics` that do not fit together."""
    check_reading(query, key, scoring, None, None, None, 1)
    if tokens.shape != key.shape[1:2] or tokens.is_floating_point():
        raise ValueError(f"tokens must be the ids of {key.shape[1]} positions, not {list(tokens.shape)} {tokens.dtype}")
    for name, number in (("early", early), ("recent", recent), ("bins", bins)):
        if not 0 < number < 1 << 30:
            raise ValueError(f"{name} is {number}: give at least 1")
    if key.shape[1] > 1 << bins - 1:
        raise ValueError(f"{bins} bins reach back {1 << bins - 1:,} positions, but there are {key.shape[1]:,} keys")


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
