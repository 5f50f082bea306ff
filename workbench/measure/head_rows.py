"""Where each head's attention goes over a whole prompt, as the kernels read it row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.attention_rows import row_blocks
from workbench.measure.head_classes import HeadStats
from workbench.measure.head_queries import earlier, probe_positions
from workbench.measure.whole_prompts import is_whole
from workbench_kernels import RowStatistics, Scoring, row_statistics
from workbench_kernels.attention_statistics import before_each

_SHARES_BYTES = 256 * 2**20  # of the shares within each distance, of so many heads at a time


def read_heads(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    scoring: Scoring,
    at: Tensor,
    held: Tensor,
    *,
    sinks: int,
    recent: int,
    probes: int,
) -> tuple[HeadStats, Tensor]:
    """What `workbench.measure.head_stats` says of queries that stand one after another at positions [nq], and each
    row's log-sum-exp [h, nq], on the device; held: the keys' positions [k or 1, nk].
    """
    (h, nq, _), (k, _, _), device = queries.shape, keys.shape, queries.device
    tokens, places = ids[: int(at[-1]) + 1].to(device), held.to(device)
    judged = _Judged(tokens, at.to(device), places, scoring, sinks, recent)
    bins, group = 1 + int(at[-1]).bit_length(), h // k
    each = max(1, _SHARES_BYTES // (4 * group * (bins + 2) * nq))
    stats, lse = [], []
    for kv in range(0, k, each):
        heads, mine = slice(kv * group, min(kv + each, k) * group), slice(kv, kv + each)
        query, key, of = queries[heads], keys[mine], scoring.of(heads)
        own = places if len(places) == 1 else places[mine]
        evicted = None if is_whole(at, held) else own
        rows = row_statistics(query, key, of, tokens, early=sinks, recent=recent, bins=bins, held=evicted)
        figures = judged.means(rows, slice(None) if len(places) == 1 else mine)
        probed = probe_positions(nq, probes)
        weights = torch.zeros(len(query), len(probed), key.shape[1], device=device)
        for block in row_blocks(query[:, probed.to(device)], key, of, query_positions=at[probed], key_positions=own):
            weights[:, block.rows, block.keys] = block.probs
        figures["variance"] = weights.var(dim=1, correction=0).sum(1, dtype=torch.float64)
        stats.append(HeadStats(**{name: figure.float().cpu() for name, figure in figures.items()}))
        lse.append(rows.lse)
    return HeadStats.join(stats, torch.cat), torch.cat(lse)


class _Judged:
    """Which queries count for which figure, bool [k or 1, nq] each, where some see no key, or no earlier one."""

    def __init__(self, tokens: Tensor, at: Tensor, held: Tensor, scoring: Scoring, sinks: int, recent: int) -> None:
        queries = at.expand(len(held), -1).contiguous()
        stops, begin = torch.searchsorted(held, queries, right=True), scoring.begin(queries)
        self.seeing = stops > (0 if begin is None else torch.searchsorted(held, begin.contiguous()))
        self.after = self.seeing & (at >= sinks)
        # Queries that have fewer tokens before them than are recent say nothing about how local a head is.
        self.late = self.seeing & (at >= recent - 1)
        self.retrieving = earlier(tokens[at], at, before_each(tokens, held), held, scoring.begin(at))[0]

    def means(self, rows: RowStatistics, kv: slice) -> dict[str, Tensor]:
        """The means of what was read of the heads of some KV heads, float64; not a number where no query counts."""

        def mean(shares: Tensor, counted: Tensor) -> Tensor:  # [h, nq] -> [h]
            counted = counted[kv].repeat_interleave(len(shares) // len(counted[kv]), dim=0)
            return (shares * counted).sum(1, dtype=torch.float64) / counted.sum(1)

        below = torch.stack([mean(share, self.seeing) for share in rows.within[:, :-1].unbind(1)], dim=1)
        return {
            "entropy": mean(rows.entropy, self.seeing),
            "sink": mean(rows.early, self.after),
            "local": mean(rows.within[:, -1], self.late),
            "retrieval": mean(rows.follows, self.retrieving),
            "distance": mean(rows.distance, self.seeing),
            "profile": below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])).clamp(min=0.0),
        }
