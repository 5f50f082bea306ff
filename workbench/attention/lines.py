"""Attention on some columns and diagonals of a head's scores, and which of them to take."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import visible_entries
from workbench.core.attention_rows import row_blocks
from workbench.core.bisection import largest
from workbench.core.partial_softmax import PartialSoftmax, between, exponentiated, weighted_sum
from workbench_kernels import Scoring

_STRETCH = 1024  # queries whose diagonals are computed together


class Lines(NamedTuple):
    """Which columns, by their position, and diagonals, by how far keys lie behind queries: bool [h, n] each."""

    columns: Tensor
    diagonals: Tensor

    def seen(self, rows: Tensor, stop: int) -> Tensor:
        """What of the keys before `stop` the queries at rows [r] see, bool [h, r, stop]; rows lie before n."""
        behind = rows[:, None] - torch.arange(stop, device=rows.device)
        return (self.columns[:, None, :stop] | self.diagonals[:, behind.clamp_min(0)]) & (behind >= 0)

    def entries(self) -> Tensor:
        """Scores on them, int64 [h]; twice where a column and a diagonal cross."""
        tokens = self.columns.shape[1]
        cost = torch.arange(tokens, 0, -1, device=self.columns.device)
        return (self.columns * cost).sum(dim=1) + (self.diagonals * cost).sum(dim=1)


class Probed(NamedTuple):
    """What the last queries of a prompt saw: their output [h, r, dv], and the weight of each column and of each
    diagonal, float32 [h, n] each.
    """

    out: Tensor
    columns: Tensor
    diagonals: Tensor


def probed(query: Tensor, key: Tensor, value: Tensor, first: int, scoring: Scoring) -> Probed:
    """Exact attention of the queries from `first` on: query [h, n, d], key [k, n, d], value [k, n, dv]."""
    heads, tokens, _ = query.shape
    out = torch.empty(heads, tokens - first, value.shape[-1], dtype=query.dtype, device=query.device)
    columns = torch.zeros(heads, tokens, device=query.device)
    diagonals = torch.zeros_like(columns)
    for block in row_blocks(query[:, first:], key, scoring):
        out[:, block.rows] = weighted_sum(block.probs, value[:, block.keys])
        columns[:, block.keys] += block.probs.sum(dim=1)
        position = torch.arange(first + block.rows.start, first + block.rows.stop, device=query.device)[:, None]
        behind = position - torch.arange(block.keys.start, block.keys.stop, device=query.device)
        diagonals.index_add_(1, behind.clamp_min(0).flatten(), block.probs.flatten(1))  # what lies ahead weighs nothing
    return Probed(out, columns, diagonals)


def widest_probe(tokens: int, most: int) -> int:
    """How many last queries of a prompt attend exactly with no more than `most` entries; at least one."""
    full = visible_entries(tokens)
    return max(largest(lambda probe: full - visible_entries(tokens - probe) <= most, 0, tokens + 1), 1)


def a_shape(heads: int, rows: int, allowed: int, share: float, device: torch.device) -> Lines:
    """The first columns and the first diagonals of `rows` rows, as many as allowed, of which `share` are columns."""

    def lines(count: int) -> Lines:
        sinks = int(share * count)
        at = torch.arange(rows, device=device)[None]
        return Lines((at < sinks).expand(heads, -1), (at < count - sinks).expand(heads, -1))

    return lines(largest(lambda count: int(lines(count).entries()[0]) <= allowed, 1, rows + 1))


def heaviest(columns: Tensor, diagonals: Tensor, allowed: int, share: float, *, first: int = 0, last: int = 0) -> Lines:
    """The columns and diagonals of most weight [h, n], as many as allowed, of which `share` are columns.

    The `first` columns and the `last` diagonals come before all others, the main one before any.
    """
    rows, device = columns.shape[1], columns.device
    cost = torch.arange(rows, 0, -1, device=device)
    at = torch.arange(rows, device=device)
    orders, spent = [], []
    for weight, always in ((columns, first), (diagonals, max(last, 1))):
        orders.append(weight.masked_fill(at < always, torch.inf).argsort(dim=1, descending=True, stable=True))
        total = cost[orders[-1]].cumsum(dim=1)
        spent.append(torch.cat([total.new_zeros(len(total), 1), total], dim=1))
    lines = torch.arange(1, 2 * rows + 1, device=device)  # how many, columns and diagonals together
    vertical = (share * lines).long()
    possible = (vertical <= rows) & (lines - vertical <= rows)
    vertical, slash = vertical[possible], (lines - vertical)[possible]
    fitting = (spent[0][:, vertical] + spent[1][:, slash] <= allowed).sum(dim=1).clamp_min(1) - 1  # [h]
    return Lines(
        *(
            torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, at < count[fitting][:, None])
            for weight, order, count in zip((columns, diagonals), orders, (vertical, slash), strict=True)
        )
    )


def heaviest_of_both(columns: Tensor, diagonals: Tensor, allowed: int) -> Lines:
    """The columns and diagonals of most weight [h, n] in one order, the main diagonal first of all, until the entries
    allowed are spent.
    """
    rows = columns.shape[1]
    weight = torch.cat([diagonals, columns], dim=1)
    weight[:, 0] = torch.inf
    order = weight.argsort(dim=1, descending=True, stable=True)
    entries = torch.arange(rows, 0, -1, device=weight.device).repeat(2)  # a later column, or one further back: fewer
    taken = entries[order].cumsum(dim=1) <= allowed
    slashes, verticals = torch.zeros_like(taken).scatter_(1, order, taken).split(rows, dim=1)
    return Lines(verticals, slashes)


def line_attention(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor, diagonals: Tensor, scoring: Scoring
) -> Tensor:
    """One head's attention [n, dv] on columns and diagonals, bool [n] each: query [n, d], key [n, d], value [n, dv]."""
    query, key, value = query.float() * scoring.scale, key.float(), value.float()
    tokens = len(key)
    verticals, behind = columns.nonzero()[:, 0], diagonals.nonzero()[:, 0].tolist()  # both ascend
    parts = []
    for start in range(0, tokens, _STRETCH):
        stop = min(start + _STRETCH, tokens)
        reach = behind[: bisect_left(behind, stop)]
        part = _on_diagonals(query[:stop], key[:stop], value[:stop], columns, reach, start, scoring)
        seen = verticals[: int(torch.searchsorted(verticals, stop))]
        if len(seen):
            hidden = seen > torch.arange(start, stop, device=query.device)[:, None]
            rows = query[None, start:stop]
            offsets = scoring.offsets(seen.new_tensor([stop - 1]), seen)
            part = part.merged(
                PartialSoftmax.over(rows, key[None, seen], value[None, seen], scoring, hidden=hidden, offsets=offsets)
            )
        parts.append(part.output(scoring)[0])
    return torch.cat(parts)


def _on_diagonals(
    query: Tensor, key: Tensor, value: Tensor, columns: Tensor, behind: list[int], start: int, scoring: Scoring
) -> PartialSoftmax:
    """What the queries from `start` on get from the keys that lie `behind` them. No scores but these are computed: one
    diagonal is one product of two views, ten times faster than gathering its keys.
    """
    stop = len(key)
    scores = query.new_full((len(behind), stop - start), -torch.inf)  # [s, r]
    spans = [(max(back - start, 0), slice(max(start - back, 0), stop - back)) for back in behind]
    for line, (first, keys) in zip(scores, spans, strict=True):
        products = (query[start + first :] * key[keys]).sum(dim=-1)
        line[first:] = scoring.bent(products[None], between(scoring, stop, keys.start, keys.stop, key.device))[0]
        line[first:].masked_fill_(columns[keys], -torch.inf)  # a crossing belongs to its column
    maximum, weights = exponentiated(scores, dim=0)
    mixed = value.new_zeros(stop - start, value.shape[-1])
    for line, (first, keys) in zip(weights, spans, strict=True):
        mixed[first:].addcmul_(line[first:, None], value[keys])
    return PartialSoftmax(maximum.T[None], weights.sum(dim=0)[None, :, None], mixed[None])
