"""Attention in which each block of queries sees a few blocks of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import visible_entries
from workbench.core.partial_softmax import PartialSoftmax, between
from workbench_kernels import Scoring

_FEWEST = 4  # blocks that a query sees, before smaller blocks are tried


class Blocks(NamedTuple):
    """Blocks of `size` tokens, of which each block of queries sees `top`, its own included: `entries` a head."""

    size: int
    top: int
    entries: int


def blocks_within(tokens: int, allowed: int, largest: int) -> Blocks:
    """The largest blocks of which a query sees several, and as many as allowed; of size 1 if nothing else fits."""
    size, smallest_plan = largest, None
    while size >= 1:
        plan = _most_blocks(tokens, allowed, size)
        if plan is not None and plan.top >= min(_FEWEST, -(-tokens // size)):
            return plan
        smallest_plan, size = smallest_plan or plan, size // 2
    return smallest_plan or Blocks(1, 1, tokens)


def _most_blocks(tokens: int, allowed: int, size: int) -> Blocks | None:
    whole, rest = divmod(tokens, size)
    number = whole + bool(rest)
    diagonal = whole * visible_entries(size) + visible_entries(rest)
    if diagonal > allowed:
        return None
    guesses = number * (number - 1) // 2
    last = rest or size
    best = Blocks(size, 1, diagonal)
    others = 0
    for top in range(2, number + 1):  # one block more for every block of queries that has so many before it
        others += (number - top) * size * size + last * size
        if diagonal + guesses + others > allowed:
            break
        best = Blocks(size, top, diagonal + guesses + others)
    return best


def block_means(key: Tensor, size: int) -> Tensor:
    """The means of keys [k, n, d] over whole blocks, float32 [k, b, d]."""
    whole = key.shape[1] // size
    means: Tensor = key[:, : whole * size].unflatten(1, (whole, size)).float().mean(dim=2)
    return means


def best_blocks(rows: Tensor, means: Tensor, top: int, *, sinks: bool) -> Tensor:
    """Which `top` blocks of keys, of means [k, b, d] that all lie before them, a block of queries rows [h, r, d] looks
    at: those whose means have the largest products with its mean, int64 [h, top]. sinks: the first is one of them.
    """
    mean = rows.float().mean(dim=1).view(len(means), -1, rows.shape[-1])  # [k, g, d]
    guess = torch.bmm(mean, means.transpose(1, 2)).flatten(0, 1)  # [h, b]
    if sinks:
        guess[:, 0] = torch.inf
    return guess.argsort(dim=1, descending=True, stable=True)[:, :top]


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Blocks,
    scoring: Scoring,
    *,
    sinks: bool,
) -> Tensor:
    """Attention [h, n, dv] in which each block of queries sees its own block and the `top` - 1 before it whose mean
    keys have the largest products with its mean query; with `sinks` the first block is one of them.
    """
    heads, tokens, _ = query.shape
    size, top, _ = plan
    groups, whole = heads // key.shape[0], tokens // size
    out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
    blocks = [x[:, : whole * size].unflatten(1, (whole, size)) for x in (key, value)]  # [k, b, size, d]
    means = block_means(key, size)
    owner = torch.arange(heads, device=query.device)[:, None] // groups
    for number, start in enumerate(range(0, tokens, size)):
        stop = min(start + size, tokens)
        rows = query[:, start:stop].float() * scoring.scale
        ahead = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu_(1)
        offsets = between(scoring, stop, start, stop, key.device)
        part = PartialSoftmax.over(
            rows, key[:, start:stop], value[:, start:stop], scoring, hidden=ahead, offsets=offsets
        )
        if top > 1 and number:
            best = best_blocks(rows, means[:, :number], top - 1, sinks=sinks)
            keys, values = (x[owner, best].flatten(1, 2) for x in blocks)  # [h, t * size, d]
            if offsets is not None:
                chosen = (best[..., None] * size + torch.arange(size, device=key.device)).flatten(1)
                offsets = scoring.offsets(torch.tensor(stop - 1), chosen)
            part = part.merged(PartialSoftmax.over(rows, keys, values, scoring, offsets=offsets))
        out[:, start:stop] = part.output(scoring)
    return out


def blocks_seen(query: Tensor, key: Tensor, plan: Blocks, rows: Tensor, stop: int, *, sinks: bool) -> Tensor:
    """What of the keys before `stop` the queries at rows [r] see in `block_attention`, bool [h, r, stop]."""
    heads, size = len(query), plan.size
    means, seen = block_means(key, size), torch.zeros(heads, len(rows), stop, dtype=torch.bool, device=query.device)
    for index, row in enumerate(rows.tolist()):
        number = row // size
        seen[:, index, number * size : row + 1] = True
        if plan.top > 1 and number:
            own = query[:, number * size : (number + 1) * size]
            best = best_blocks(own, means[:, :number], plan.top - 1, sinks=sinks)
            at = best[..., None] * size + torch.arange(size, device=query.device)
            seen[:, index].scatter_(1, at.flatten(1), True)
    return seen
