"""Block-sparse attention with patterns found as a prompt is read."""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.core.attention_rows import row_blocks
from workbench.core.partial_softmax import PartialSoftmax, exponentiated, weighted_sum
from workbench.registry import Paper, param, register
from workbench_kernels import Scoring

_PROBING = 0.25  # of the entries at most that go into the probing queries
_STRETCH = 1024  # queries whose diagonals are computed together
_FEWEST = 4  # blocks that a query sees, before smaller blocks are tried


@register
class BlockSparse(AttentionMethod):
    """Guess cheaply which scores of a head will matter, and compute only those.

    The two dynamic patterns of MInference. "vertical-slash": the prompt's last `probe` queries attend exactly; the
    columns and diagonals that got most weight from them are computed for all queries before. "block": queries and keys
    are averaged over blocks, and each block of queries sees its own block and those whose products with it are largest.

    The paper searches offline how many columns and diagonals each head gets; here columns and diagonals compete, one
    ranking a head by mean weight per entry, until the entries allowed are spent, so each head finds its own mixture.
    Only the main diagonal is certain (the paper also keeps some first columns and last diagonals, which win anyway).
    The probing queries' rows are exact, since they have been computed.

    Means hide an attention sink among its neighbours, so the first block of keys is always one of those seen, unless
    `sinks` is off, as published: on the default model, at half of the entries, the divergence from exact attention
    falls from 3.3 to 0.06 nats. Blocks of 16 served best there; the paper's kernel has 64.

    With a small budget there are fewer probing queries, so that they take at most a quarter, and blocks are smaller on
    short prompts. All that is computed counts: the probes, averaged blocks, and twice an entry where a chosen column
    and diagonal cross; of a block on the main diagonal the visible half, as elsewhere.

    Only reading is changed, as published: MInference is for the time before the first token, and decodes over the whole
    cache. Its patterns need many queries at once: the last of a prompt choose columns and diagonals for all before
    them, and blocks of queries share a choice; a single query has nobody to share with. (Choosing blocks of keys for
    each new token is another family of methods; KV methods with an index do it.)
    """

    key = "block-sparse"
    title = "Block-sparse (MInference)"
    paper = Paper(
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
        "Jiang et al. 2024",
        "2407.02490",
    )
    claim = "up to 10 times faster reading of 1M tokens"
    default_budget = 0.25
    looks_ahead: ClassVar[bool] = True

    pattern: Literal["vertical-slash", "block"] = param("vertical-slash", help="what is computed of the scores")
    probe: int = param(64, ge=1, le=4096, unit="tokens", help="last queries that choose columns and diagonals")
    block: Literal[16, 32, 64, 128] = param(16, unit="tokens", help="size of the blocks, at most")
    sinks: bool = param(True, help="whether all see the first block, in the block pattern")

    def entries(self, tokens: int, layers: int) -> int:
        allowed, full = self._allowed(tokens), visible_entries(tokens)
        if allowed >= full:
            return layers * full
        if self.pattern == "block":
            return layers * _blocks(tokens, allowed, self.block).entries
        return layers * max(allowed, 2 * tokens - 1)  # no less than one probing query and the main diagonal

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        tokens = query.shape[1]
        allowed = self._allowed(tokens)
        if scoring.window is not None or allowed >= visible_entries(tokens):
            most = self.entries(tokens, layers=1)
            return windowed_attention(query, key, value, scoring, context, most)
        if self.pattern == "block":
            plan = _blocks(tokens, allowed, self.block)
            context.count(query.shape[0] * plan.entries)
            return block_attention(query, key, value, plan, scoring, sinks=self.sinks)
        # What there has to be at least: on short prompts a budget allows less than every query's own token.
        allowed = self.entries(tokens, layers=1)
        probe = min(self.probe, _widest_probe(tokens, allowed))
        out, computed = vertical_slash_attention(query, key, value, probe, allowed, scoring)
        context.count(computed)
        return out

    def _allowed(self, tokens: int) -> int:
        budget = self.effective_budget
        assert budget is not None
        return allowed_entries(budget, tokens)


def vertical_slash_attention(
    query: Tensor, key: Tensor, value: Tensor, probe: int, allowed: int, scoring: Scoring
) -> tuple[Tensor, int]:
    """Attention [h, n, dv] whose last `probe` rows are exact and the others see the columns and diagonals that those
    rows weigh most, at most `allowed` entries a head; and how many were computed, over all heads.
    """
    heads, tokens, _ = query.shape
    first = tokens - probe
    out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=query.device)
    columns = torch.zeros(heads, tokens, device=query.device)
    diagonals = torch.zeros_like(columns)  # by how far the key lies behind the query
    for block in row_blocks(query[:, first:], key, scoring):
        probs = block.probs  # [h, r, n]
        rows = slice(first + block.rows.start, first + block.rows.stop)
        out[:, rows] = weighted_sum(probs, value[:, block.keys])
        columns[:, block.keys] += probs.sum(dim=1)
        position = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
        behind = position - torch.arange(block.keys.start, block.keys.stop, device=query.device)
        diagonals.index_add_(1, behind.clamp_min(0).flatten(), probs.flatten(1))  # what lies ahead weighs nothing
    computed = heads * (visible_entries(tokens) - visible_entries(first))
    if not first:
        return out, computed
    chosen = chosen_lines(columns[:, :first], diagonals[:, :first], allowed - computed // heads)
    cost = torch.arange(first, 0, -1, device=query.device)
    for head, (verticals, slashes) in enumerate(zip(*chosen, strict=True)):
        group = head * key.shape[0] // heads
        computed += int(cost[verticals].sum() + cost[slashes].sum())
        out[head, :first] = _on_lines(
            query[head, :first].float() * scoring.scale,
            key[group, :first].float(),
            value[group, :first].float(),
            verticals,
            slashes,
            scoring,
        )
    return out, computed


def chosen_lines(columns: Tensor, diagonals: Tensor, allowed: int) -> tuple[Tensor, Tensor]:
    """Which columns and diagonals of n rows to compute, bool [h, n] each, from the weight [h, n] that each has.

    Those of most weight, the main diagonal first of all, as long as the entries on them are at most `allowed` a head.
    """
    rows = columns.shape[1]
    weight = torch.cat([diagonals, columns], dim=1)
    weight[:, 0] = torch.inf
    order = weight.argsort(dim=1, descending=True, stable=True)
    entries = torch.arange(rows, 0, -1, device=weight.device).repeat(2)  # a later column, or one further back: fewer
    taken = entries[order].cumsum(dim=1) <= allowed
    chosen = torch.zeros_like(taken).scatter_(1, order, taken)
    slashes, verticals = chosen.split(rows, dim=1)
    return verticals, slashes


def _on_lines(
    query: Tensor, key: Tensor, value: Tensor, verticals: Tensor, slashes: Tensor, scoring: Scoring
) -> Tensor:
    """One head's attention [n, dv] on its columns and diagonals: scaled query [n, d], key [n, d], value [n, dv] in
    float32, verticals and slashes bool [n].
    """
    tokens = len(key)
    columns, behind = verticals.nonzero()[:, 0], slashes.nonzero()[:, 0].tolist()  # both ascend
    parts = []
    for start in range(0, tokens, _STRETCH):
        stop = min(start + _STRETCH, tokens)
        reach = behind[: bisect_left(behind, stop)]
        part = _on_diagonals(query[:stop], key[:stop], value[:stop], verticals, reach, start, scoring)
        seen = columns[: int(torch.searchsorted(columns, stop))]
        if len(seen):
            hidden = seen > torch.arange(start, stop, device=query.device)[:, None]
            rows = query[None, start:stop]
            part = part.merged(PartialSoftmax.over(rows, key[None, seen], value[None, seen], scoring, hidden=hidden))
        parts.append(part.output()[0])
    return torch.cat(parts)


def _on_diagonals(
    query: Tensor, key: Tensor, value: Tensor, verticals: Tensor, behind: list[int], start: int, scoring: Scoring
) -> PartialSoftmax:
    """What the queries from `start` on get from the keys that lie `behind` them. No scores but these are computed: one
    diagonal is one product of two views, ten times faster than gathering its keys.
    """
    stop = len(key)
    scores = query.new_full((len(behind), stop - start), -torch.inf)  # [s, r]
    spans = [(max(back - start, 0), slice(max(start - back, 0), stop - back)) for back in behind]
    for line, (first, keys) in zip(scores, spans, strict=True):
        line[first:] = scoring.cap((query[start + first :] * key[keys]).sum(dim=-1))
        line[first:].masked_fill_(verticals[keys], -torch.inf)  # a crossing belongs to its column
    maximum, weights = exponentiated(scores, dim=0)
    mixed = value.new_zeros(stop - start, value.shape[-1])
    for line, (first, keys) in zip(weights, spans, strict=True):
        mixed[first:].addcmul_(line[first:, None], value[keys])
    return PartialSoftmax(maximum.T[None], weights.sum(dim=0)[None, :, None], mixed[None])


def _widest_probe(tokens: int, allowed: int) -> int:
    """How many last queries may attend exactly without taking more than their part of the entries; at least one."""
    full, most = visible_entries(tokens), max(int(_PROBING * allowed), tokens)
    probe = 1
    while probe < tokens and full - visible_entries(tokens - probe - 1) <= most:
        probe += 1
    return probe


class _Blocks(NamedTuple):
    """Blocks of `size` tokens, of which each block of queries sees `top`, its own included: `entries` a head."""

    size: int
    top: int
    entries: int


def _blocks(tokens: int, allowed: int, largest: int) -> _Blocks:
    """The largest blocks of which a query sees several, and as many as allowed; of size 1 if nothing else fits."""
    size, smallest_plan = largest, None
    while size >= 1:
        plan = _most_blocks(tokens, allowed, size)
        if plan is not None and plan.top >= min(_FEWEST, -(-tokens // size)):
            return plan
        smallest_plan, size = smallest_plan or plan, size // 2
    return smallest_plan or _Blocks(1, 1, tokens)


def _most_blocks(tokens: int, allowed: int, size: int) -> _Blocks | None:
    whole, rest = divmod(tokens, size)
    number = whole + bool(rest)
    diagonal = whole * visible_entries(size) + visible_entries(rest)
    if diagonal > allowed:
        return None
    guesses = number * (number - 1) // 2
    last = rest or size
    best = _Blocks(size, 1, diagonal)
    others = 0
    for top in range(2, number + 1):  # one block more for every block of queries that has so many before it
        others += (number - top) * size * size + last * size
        if diagonal + guesses + others > allowed:
            break
        best = _Blocks(size, top, diagonal + guesses + others)
    return best


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: _Blocks,
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
    means = blocks[0].float().mean(dim=2)  # [k, b, d]
    owner = torch.arange(heads, device=query.device)[:, None] // groups
    for number, start in enumerate(range(0, tokens, size)):
        stop = min(start + size, tokens)
        rows = query[:, start:stop].float() * scoring.scale
        ahead = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu_(1)
        part = PartialSoftmax.over(rows, key[:, start:stop], value[:, start:stop], scoring, hidden=ahead)
        if top > 1 and number:
            mean = rows.mean(dim=1).view(-1, groups, rows.shape[-1])  # [k, g, d]
            guess = torch.bmm(mean, means[:, :number].transpose(1, 2)).flatten(0, 1)  # [h, b]
            if sinks:
                guess[:, 0] = torch.inf
            best = guess.argsort(dim=1, descending=True, stable=True)[:, : top - 1]  # [h, t]
            keys, values = (x[owner, best].flatten(1, 2) for x in blocks)  # [h, t * size, d]
            part = part.merged(PartialSoftmax.over(rows, keys, values, scoring))
        out[:, start:stop] = part.output()
    return out
