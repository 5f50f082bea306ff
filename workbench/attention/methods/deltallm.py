"""DeltaLLM's attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, windowed_attention
from workbench.attention.token_groups import groups_behind, split
from workbench.core.partial_softmax import ROWS, PartialSoftmax, between
from workbench.kv.stores.delta import deltas, restored
from workbench.registry import Fidelity, Paper, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised

_MOST_ZEROS = 0.9  # beyond it a narrower window, or shorter groups, come first


@register
class DeltaAttention(AttentionMethod):
    """Score a key by its difference to the key before it, multiplying only the channels that moved.

    A product q k_j is q k_(j-1) plus q times what changed between the two keys. A channel counts as unchanged until it
    differs by more than a threshold from its last number, so most differences are zero and nothing is multiplied for
    them, while errors do not add up. Attention is hybrid: exact scores over the last `window` tokens, such sums before.

    As in the KV method of this paper, sums begin anew every `group` tokens with a whole key, and each such group of a
    KV head has the smallest threshold at which the share `sparsity` of its differences is zero; only whole groups are
    approximated, so that no query sees what comes after it. An entry here is d products, one for each channel of a key:
    a key of which a quarter of the channels moved counts a quarter. The values are not approximated, nor counted. With
    a budget "auto" takes the fewest zeros that meet it; beyond 90 % the window is narrowed first, and then the groups.

    Decoding goes on so, as published: groups, window and zeros are those of the prompt (a budget of 1: all is exact),
    and what a KV method has dropped or rounded is not there for either. The window and the groups count what a KV head
    holds. As soon as a group is old its differences are made and held beside the cache until what the cache holds of it
    changes: 8 bytes for each that is not zero, counted as memory of attention. The KV method `deltallm` makes the cache
    itself smaller in the same manner.
    """

    key = "deltallm-attention"
    title = "DeltaLLM (attention)"
    paper = Paper(
        "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference",
        "Qi et al. 2025",
        "2507.19608",
    )
    claim = "60 % of the products with keys skipped while reading, at about the same accuracy"
    fidelity = Fidelity(
        "reconstructed from the abstract", "where sums begin anew, and how a budget chooses the zeros, is chosen here"
    )

    decodes: ClassVar[bool] = True

    sparsity: Literal["auto", 30, 40, 50, 60, 70, 80, 90] = param(
        "auto",
        unit="%",
        help="share of key differences that are zero: 60, or as few as the budget asks for",
        own="60 % is the abstract's; which threshold gives it is chosen here",
    )
    window: int = param(
        32,
        ge=1,
        le=4096,
        unit="tokens",
        help="last tokens with exact scores, at most with a budget",
        own="the paper's window was not read",
    )
    group: Literal[16, 32, 64, 128] = param(
        64,
        unit="tokens",
        help="after how many tokens sums begin anew, at most",
        own="not in the abstract; errors must not add up over a prompt",
    )

    def entries(self, tokens: int, layers: int) -> int:
        return layers * self._shape(tokens).entries

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        shape, tokens = self._shape(query.shape[1]), query.shape[1]
        if scoring.window is not None or shape.zeros <= 0 or shape.window >= tokens:
            return windowed_attention(query, key, value, scoring, context, shape.entries)
        out, computed = delta_attention(query, key, value, shape, scoring)
        context.count(computed)
        return out

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        shape, kv_heads = self._shape(context.tokens), len(contents.keys)
        groups = len(query) // kv_heads
        out = torch.empty(*query.shape[:2], contents.values.shape[-1], dtype=query.dtype, device=query.device)
        exact = self.whole or shape.zeros <= 0
        for head, positions in enumerate(contents.positions.expand(kv_heads, -1)):
            heads = slice(head * groups, (head + 1) * groups)
            slots = visible[head].any(dim=0).nonzero()[:, 0]
            slots = slots[positions[slots].argsort()]  # what is seen, by position
            keys, values, where = contents.keys[head, slots].float(), contents.values[head, slots], positions[slots]
            seen = visible[head][:, slots]  # [q, c]
            remembered = context.state.get((self.key, context.layer, head), ())
            for start in range(0, query.shape[1], ROWS):
                visible_rows = seen[start : start + ROWS]
                numbers = torch.arange(seen.shape[1], device=seen.device)
                last_seen = (visible_rows * numbers).amax(dim=1)  # each query's own
                old = torch.zeros_like(last_seen) if exact else groups_behind(last_seen, shape.group, shape.window)
                remembered = _updated(remembered, keys, where, int(old.amax()), shape)
                rows = query[heads, start : start + ROWS].float() * scoring.scale
                part, computed = _over(
                    rows,
                    keys,
                    values,
                    visible_rows,
                    old,
                    remembered,
                    shape.group,
                    scoring.of(heads),
                    scoring.offsets(context.positions, where),
                )
                context.count(computed)
                out[heads, start : start + ROWS] = part.output(scoring.of(heads))
            if remembered:
                context.state[self.key, context.layer, head] = remembered
        return out

    def _shape(self, tokens: int) -> _Shape:
        """Groups, window and share of zeros on a prompt of this length."""
        fixed = None if self.sparsity == "auto" else self.sparsity / 100
        if self.budget is None:
            return _Shape.of(tokens, self.group, self.window, 0.6 if fixed is None else fixed)
        allowed = allowed_entries(self.budget, tokens)
        if allowed >= visible_entries(tokens):
            return _Shape.of(tokens, self.group, tokens, 0.0)
        sizes = [(group, window) for group in _halves(self.group, 4) for window in _halves(self.window, 1)]
        fitting = []
        for group, window in sizes:
            zeros = _fewest_zeros(tokens, group, window, allowed) if fixed is None else fixed
            shape = _Shape.of(tokens, group, window, min(zeros, 1.0))
            if shape.entries <= allowed:
                fitting.append(shape)
                if fixed is not None or zeros <= _MOST_ZEROS:
                    return shape
        if fitting:
            return min(fitting, key=lambda shape: shape.zeros)
        least = 1.0 if fixed is None else fixed
        return min((_Shape.of(tokens, *size, least) for size in sizes), key=lambda shape: shape.entries)


class _Shape(NamedTuple):
    """Groups, window, share of differences that are zero, and the entries that a head computes."""

    group: int
    window: int
    zeros: float
    entries: int

    @classmethod
    def of(cls, tokens: int, group: int, window: int, zeros: float) -> _Shape:
        pairs = split(tokens, group, window)
        each = 1 + (group - 1) * (1 - zeros)
        return cls(group, window, zeros, pairs.exact + math.ceil(pairs.coarse * each - 1e-6))


def _fewest_zeros(tokens: int, group: int, window: int, allowed: int) -> float:
    """The smallest share of zeros with which no more entries are computed than allowed; above 1 if none is enough."""
    pairs = split(tokens, group, window)
    if not pairs.coarse:
        return 0.0 if pairs.exact <= allowed else 2.0
    each = (allowed - pairs.exact) / pairs.coarse  # entries for a query and a group
    return max(0.0, 1 - (each - 1) / (group - 1))


def _halves(first: int, last: int) -> list[int]:
    return [first] if first <= last else [first, *_halves(first // 2, last)]


def delta_attention(query: Tensor, key: Tensor, value: Tensor, shape: _Shape, scoring: Scoring) -> tuple[Tensor, int]:
    """Attention [h, n, dv] of query [h, n, d] over key [k, n, d], value [k, n, dv], and the entries computed."""
    heads, tokens, width = query.shape
    device, groups = query.device, heads // key.shape[0]
    out = torch.empty(heads, tokens, value.shape[-1], dtype=query.dtype, device=device)
    changes = [_changes(x, shape) for x in key.float()]
    products = 0
    for start in range(0, tokens, ROWS):
        at_row = torch.arange(start, min(start + ROWS, tokens), device=device)
        stop = start + len(at_row)
        rows = query[:, start:stop].float() * scoring.scale
        old = groups_behind(at_row, shape.group, shape.window)
        low, most = int(old[0]) * shape.group, int(old[-1])
        near = torch.arange(low, stop, device=device)
        hidden = (near > at_row[:, None]) | (near < old[:, None] * shape.group)
        offsets = between(scoring, stop, 0, stop, device)
        part = PartialSoftmax.over(
            rows,
            key[:, low:stop],
            value[:, low:stop],
            scoring,
            hidden=hidden,
            offsets=None if offsets is None else offsets[low:],
        )
        if most:
            by_group = rows.reshape(len(changes), -1, width)  # [k, g * r, d]
            scores = torch.stack([_sums(x, held, most) for x, held in zip(by_group, changes, strict=True)])
            old_offsets = None if offsets is None else offsets[: most * shape.group]
            scores = scoring.bent(scores.view(heads, len(at_row), -1), old_offsets)
            scores.masked_fill_(torch.arange(scores.shape[-1], device=device) >= old[:, None] * shape.group, -torch.inf)
            part = part.merged(PartialSoftmax.of_scores(scores, value[:, : most * shape.group]))
            products += groups * sum(int(c.products[old].sum()) for c in changes)
        out[:, start:stop] = part.output(scoring)
    exact = heads * split(tokens, shape.group, shape.window).exact
    return out, exact + -(-products // width)


class _Changes(NamedTuple):
    """One KV head's keys as differences: where int [2, nnz] (token, channel), by token; how much [nnz]. products
    int [m + 1]: how many there are in the first 0 .. m groups of `group` tokens.
    """

    where: Tensor
    much: Tensor
    products: Tensor
    group: int


def _changes(key: Tensor, shape: _Shape) -> _Changes:
    """The differences of float32 keys [n, d] in all groups that some query of a prompt sees as such."""
    number = split(len(key), shape.group, shape.window).groups
    return _changes_in(key[: number * shape.group].view(number, shape.group, key.shape[1]), shape)


def _changes_in(blocks: Tensor, shape: _Shape) -> _Changes:
    """The differences in groups [m, g, d] of float32 keys."""
    number, group, width = blocks.shape
    count = int(width * (group - 1) * (1 - shape.zeros) + 1e-9)
    numbers, bits, _ = deltas(blocks, count)
    near = restored(numbers, bits, width, group)  # [m, g, d]
    moves = torch.cat([near[:, :1], near.diff(dim=1)], dim=1)
    moves[:, 0].masked_fill_(moves[:, 0] == 0, torch.finfo(moves.dtype).tiny)  # a whole key is multiplied whole
    where = moves.flatten(0, 1).nonzero().T  # ascending by token
    each = torch.zeros(number + 1, dtype=torch.long, device=blocks.device)
    each.index_add_(0, where[0] // group + 1, torch.ones_like(where[0]))
    return _Changes(where, moves.flatten(0, 1)[where[0], where[1]], each.cumsum(dim=0), group)


def _sums(rows: Tensor, changes: _Changes, number: int) -> Tensor:
    """Scores [r, number * group] of scaled rows [r, d] over the first groups: only what changed is multiplied."""
    count = int(changes.products[number])
    size = (number * changes.group, rows.shape[1])
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # said in so many words, or torch 2.11 warns
        moves = torch.sparse_coo_tensor(changes.where[:, :count], changes.much[:count], size, is_coalesced=True)
    steps: Tensor = torch.sparse.mm(moves, rows.T).view(number, changes.group, -1)
    return steps.cumsum(dim=1).flatten(0, 1).T.contiguous()


class _RememberedChanges(NamedTuple):
    """The differences of some groups that follow one another, held from one new token to the next.

    places int32 [nnz] (token * d + channel), ascending; much float32 [nnz]; products as in _Changes. positions int
    [m * g] and sums float32 [m, d] of their keys: whether these are still the groups that the cache holds.
    """

    places: Tensor
    much: Tensor
    products: Tensor
    positions: Tensor
    sums: Tensor

    @classmethod
    def of(cls, blocks: Tensor, positions: Tensor, shape: _Shape) -> _RememberedChanges:
        """Of groups [m, g, d] of float32 keys at positions [m * g]."""
        changes = _changes_in(blocks, shape)
        places = (changes.where[0] * blocks.shape[2] + changes.where[1]).to(torch.int32)
        return cls(places, changes.much, changes.products, positions.clone(), blocks.sum(dim=1))

    def still(self, blocks: Tensor, positions: Tensor) -> bool:
        """Whether groups that begin where these do are the same."""
        here = blocks[: len(self.sums)]
        return torch.equal(self.positions, positions[: len(self.positions)]) and torch.equal(self.sums, here.sum(dim=1))

    def changes(self, group: int) -> _Changes:
        width = self.sums.shape[1]
        places = self.places.long()
        where = torch.stack([torch.div(places, width, rounding_mode="floor"), places % width])
        return _Changes(where, self.much, self.products, group)


def _updated(
    remembered: tuple[_RememberedChanges, ...], keys: Tensor, positions: Tensor, number: int, shape: _Shape
) -> tuple[_RememberedChanges, ...]:
    """The differences of the first `number` groups of float32 keys [n, d] at positions [n], of which those in
    `remembered` have been made before; what has changed since is made anew.
    """
    group = shape.group
    blocks, positions = keys[: number * group].view(number, group, keys.shape[1]), positions[: number * group]
    kept: list[_RememberedChanges] = []
    done = 0
    for some in remembered:
        if not some.still(blocks[done:], positions[done * group :]):
            break
        kept.append(some)
        done += len(some.sums)
    if done < number:
        kept.append(_RememberedChanges.of(blocks[done:], positions[done * group :], shape))
    return tuple(kept)


def _over(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    old: Tensor,
    remembered: tuple[_RememberedChanges, ...],
    group: int,
    scoring: Scoring,
    offsets: Tensor | None,
) -> tuple[PartialSoftmax, int]:
    """What scaled rows [g, r, d] get from one KV head's float32 keys [c, d] and values [c, dv] by position, where seen
    [r, c], the first old [r] groups by their differences; and how many entries that takes. offsets int [c]: see
    `Scoring.offsets`.
    """
    heads, number, width = rows.shape
    low, most = int(old.amin()) * group, int(old.amax()) * group
    fine = seen[:, low:] & (torch.arange(low, len(keys), device=keys.device) >= old[:, None] * group)
    near, far = (None, None) if offsets is None else (offsets[low:], offsets[:most])
    part = PartialSoftmax.over(rows, keys[None, low:], values[None, low:], scoring, hidden=~fine, offsets=near)
    computed = heads * int(fine.sum())
    if not most:
        return part, computed
    changes = [some.changes(group) for some in remembered]
    scores = torch.cat([_sums(rows.flatten(0, 1), some, len(some.products) - 1) for some in changes], dim=1)
    scores = scoring.bent(scores.view(heads, number, -1)[..., :most], far)
    coarse = seen[:, :most] & (torch.arange(most, device=keys.device) < old[:, None] * group)
    part = part.merged(PartialSoftmax.of_scores(scores.masked_fill(~coarse, -torch.inf), values[None, :most]))
    each = torch.cat([some.products.diff() for some in changes])
    products = torch.nn.functional.pad(each.cumsum(0), (1, 0))
    return part, computed + -(-heads * int(products[old].sum()) // width)
