"""What a budget of score entries allows one head in one layer, and layers whose window is already narrow."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from workbench.attention.base import PassContext, visible_entries
from workbench.budget import Budget
from workbench.core.bisection import largest
from workbench.core.causal_attention import causal_attention
from workbench_kernels import Scoring


def allowed_entries(budget: Budget, tokens: int) -> int:
    """Score entries that each head of each layer may compute while `tokens` are read, every layer the same."""
    return int(budget.amount * visible_entries(tokens) + 1e-6)


def widest_window(tokens: int, entries: int) -> int:
    """The widest window in which a head computes no more than `entries`; 0 if there is none."""
    return largest(lambda width: visible_entries(tokens, width) <= entries, 0, tokens + 1)


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    context: PassContext,
    entries: int,
) -> Tensor:
    """Attention in a layer that has a sliding window of its own: exact, or in a narrower window where a head may
    compute no more than `entries`. Sparse patterns over long distances have nothing to gain there.
    """
    tokens = query.shape[1]
    window = min(scoring.window or tokens, max(widest_window(tokens, entries), 1))
    context.count(query.shape[0] * visible_entries(tokens, window))
    return causal_attention(query, key, value, replace(scoring, window=window))
