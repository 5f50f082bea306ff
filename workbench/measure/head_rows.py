"""Where each head's attention goes over a whole prompt, as the kernels read it row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.attention_rows import row_blocks
from workbench.measure.head_classes import HeadStats
from workbench.measure.head_queries import earlier, probe_positions
from workbench_kernels import Scoring, read_attention, row_statistics

_SHARES_BYTES = 256 * 2**20  # of the shares within each distance, of so many heads at a time


def read_heads(
    queries: Tensor, keys: Tensor, ids: Tensor, scoring: Scoring, *, sinks: int, recent: int, probes: int
) -> tuple[HeadStats, Tensor]:
    """`workbench.measure.head_stats` of queries that are those of the last keys, none of which was evicted."""
    (h, nq, _), (k, nk, _) = queries.shape, keys.shape
    tokens = ids[:nk].to(queries.device)
    held = torch.arange(nk, device=tokens.device)
    at = held[nk - nq :]
    before = torch.where(held > 0, tokens[held - 1], -1)
    retrieving = earlier(tokens[at], at, before[None], held[None], scoring.begin(at))[0].sum().double()
    bins = 1 + (nk - 1).bit_length()
    group = h // k
    each = max(1, _SHARES_BYTES // (4 * group * (bins + 2) * nq))
    stats, received = [], []
    for kv in range(0, k, each):
        heads = slice(kv * group, min(kv + each, k) * group)
        query, key, of = queries[heads], keys[kv : kv + each], scoring.of(heads)
        rows = row_statistics(query, key, of, tokens, early=sinks, recent=recent, bins=bins)
        sums = read_attention(query, key, of.without_sinks(), lse=rows.lse).sums
        assert sums is not None
        received.append(sums.cpu())
        # Queries that have fewer tokens before them than are recent say nothing about how local a head is.
        after, late = (min(max(least - (nk - nq), 0), nq) for least in (sinks, recent - 1))
        below = rows.within[:, :-1].sum(2, dtype=torch.float64) / nq  # [h, bins]
        figures = {
            "entropy": _mean(rows.entropy, 0),
            "sink": _mean(rows.early, after),
            "local": _mean(rows.within[:, -1], late),
            "retrieval": rows.follows.sum(1, dtype=torch.float64) / retrieving,
            "distance": _mean(rows.distance, 0),
            "variance": _variance(query, key, of, probe_positions(nq, probes)),
            "profile": below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])).clamp(min=0.0),
        }
        stats.append(HeadStats(**{name: figure.float().cpu() for name, figure in figures.items()}))
    return HeadStats.join(stats, torch.cat), torch.cat(received)


def _mean(shares: Tensor, first: int) -> Tensor:
    """The mean of shares [h, n] of the queries from `first` on, float64 [h]; not a number where there is none."""
    return shares[:, first:].mean(1, dtype=torch.float64)


def _variance(queries: Tensor, keys: Tensor, scoring: Scoring, probed: Tensor) -> Tensor:
    """The variance over the queries at slots `probed` of what each key gets, summed over the keys: float64 [h]."""
    positions = probed + keys.shape[1] - queries.shape[1]
    rows = torch.zeros(len(queries), len(probed), keys.shape[1], device=queries.device)
    for block in row_blocks(queries[:, probed.to(queries.device)], keys, scoring, query_positions=positions):
        rows[:, block.rows, block.keys] = block.probs
    return rows.var(dim=1, correction=0).sum(1, dtype=torch.float64)
