"""Memory-efficient attention."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, Pass, visible_entries
from workbench.registry import Paper, param, register
from workbench_kernels import Scoring


@register
class MemoryEfficient(AttentionMethod):
    """Compute exact attention chunk by chunk, so that the matrix of scores never exists.

    For each chunk of queries, a running maximum, a running sum and a running output are carried over the chunks of keys
    (section 2 of the paper). Chunks of keys that no query may see are skipped. The result is that of plain attention.
    """

    key = "memory-efficient"
    title = "Memory-efficient attention"
    paper = Paper("Self-attention Does Not Need O(n^2) Memory", "Rabe and Staats 2021", "2112.05682")
    claim = "59 times less memory for self-attention over 16k tokens"

    query_chunk: int = param(128, ge=1, le=65536, unit="tokens", help="queries computed together")
    key_chunk: int = param(256, ge=1, le=65536, unit="tokens", help="keys that they look at in one step")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, *, at: Pass) -> Tensor:
        at.count(query.shape[0] * visible_entries(query.shape[1], scoring.window))
        return chunked_attention(
            query,
            key,
            value,
            scoring,
            query_chunk=self.query_chunk,
            key_chunk=self.key_chunk,
        )


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    query_chunk: int = 128,
    key_chunk: int = 256,
) -> Tensor:
    """Causal attention of query [h, n, d] over key [k, n, d], value [k, n, dv]: [h, n, dv], in float32 inside.

    Beside the output it needs h * query_chunk * key_chunk numbers a few times over, whatever n is.
    """
    heads, tokens, _ = query.shape
    out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
    for start in range(0, tokens, query_chunk):
        stop = min(start + query_chunk, tokens)
        rows = query[:, start:stop].unflatten(0, (key.shape[0], -1)).float() * scoring.scale  # [k, g, q, d]
        highest = rows.new_full((*rows.shape[:3], 1), torch.finfo(rows.dtype).min)  # finite: exp(-inf - highest) is 0
        total = torch.zeros_like(highest)
        mixed = rows.new_zeros(*rows.shape[:3], value.shape[-1])
        first = (
            0 if scoring.window is None else max(0, start - scoring.window + 1)
        )  # the first that the first query sees
        for low in range(first, stop, key_chunk):
            high = min(low + key_chunk, stop)
            scores = _scores(rows, key[:, low:high], scoring)  # [k, g, q, c]
            _hide_unseen(scores, start, low, scoring.window)
            higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
            weights = scores.sub_(higher).exp_()
            fade = (highest - higher).exp_()  # what was summed up so far, measured by the new maximum
            total = total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
            mixed = mixed.mul_(fade).add_(_mix(weights, value[:, low:high]))
            highest = higher
        out[:, start:stop] = (mixed / total).flatten(0, 1)
    return out


def _scores(rows: Tensor, keys: Tensor, scoring: Scoring) -> Tensor:
    """Scaled rows [k, g, q, d] times keys [k, c, d]: [k, g, q, c]. One product a KV head, its keys read once."""
    return scoring.cap(torch.bmm(rows.flatten(1, 2), keys.float().transpose(1, 2)).unflatten(1, rows.shape[1:3]))


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [k, g, q, c] times values [k, c, dv]: [k, g, q, dv]."""
    return torch.bmm(weights.flatten(1, 2), values.float()).unflatten(1, weights.shape[1:3])


def _hide_unseen(scores: Tensor, start: int, low: int, window: int | None) -> None:
    """Set scores [..., q, c] of queries from `start` on and keys from `low` on to -inf where the query may not look."""
    rows, keys = scores.shape[-2:]
    ahead = low + keys - 1 > start  # some key comes after the first query
    behind = window is not None and low <= start + rows - 1 - window  # the last query no longer sees the first key
    if not (ahead or behind):
        return
    query_at = torch.arange(start, start + rows, device=scores.device)[:, None]
    key_at = torch.arange(low, low + keys, device=scores.device)
    unseen = key_at > query_at
    if window is not None:
        unseen |= key_at <= query_at - window
    scores.masked_fill_(unseen, -torch.inf)
