"""Scores of keys by their differences to the keys before them, and attention over them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.attention.token_groups import groups_behind, split
from workbench.core.partial_softmax import ROWS, PartialSoftmax, between
from workbench.kv.stores.delta import deltas
from workbench_kernels import Scoring
from workbench_kernels.rows import restored


class DeltaShape(NamedTuple):
    """Groups, window, share of differences that are zero, and the entries that a head computes."""

    group: int
    window: int
    zeros: float
    entries: int

    @classmethod
    def of(cls, tokens: int, group: int, window: int, zeros: float) -> DeltaShape:
        pairs = split(tokens, group, window)
        each = 1 + (group - 1) * (1 - zeros)
        return cls(group, window, zeros, pairs.exact + math.ceil(pairs.coarse * each - 1e-6))


def fewest_zeros(tokens: int, group: int, window: int, allowed: int) -> float:
    """The smallest share of zeros with which no more entries are computed than allowed; above 1 if none is enough."""
    pairs = split(tokens, group, window)
    if not pairs.coarse:
        return 0.0 if pairs.exact <= allowed else 2.0
    each = (allowed - pairs.exact) / pairs.coarse  # entries for a query and a group
    return max(0.0, 1 - (each - 1) / (group - 1))


def delta_attention(
    query: Tensor, key: Tensor, value: Tensor, shape: DeltaShape, scoring: Scoring
) -> tuple[Tensor, int]:
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


class Changes(NamedTuple):
    """One KV head's keys as differences: where int [2, nnz] (token, channel), by token; how much [nnz]. products
    int [m + 1]: how many there are in the first 0 .. m groups of `group` tokens.
    """

    where: Tensor
    much: Tensor
    products: Tensor
    group: int


def _changes(key: Tensor, shape: DeltaShape) -> Changes:
    """The differences of float32 keys [n, d] in all groups that some query of a prompt sees as such."""
    number = split(len(key), shape.group, shape.window).groups
    return _changes_in(key[: number * shape.group].view(number, shape.group, key.shape[1]), shape)


def _changes_in(blocks: Tensor, shape: DeltaShape) -> Changes:
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
    return Changes(where, moves.flatten(0, 1)[where[0], where[1]], each.cumsum(dim=0), group)


def _sums(rows: Tensor, changes: Changes, number: int) -> Tensor:
    """Scores [r, number * group] of scaled rows [r, d] over the first groups: only what changed is multiplied."""
    count = int(changes.products[number])
    size = (number * changes.group, rows.shape[1])
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # said in so many words, or torch 2.11 warns
        moves = torch.sparse_coo_tensor(changes.where[:, :count], changes.much[:count], size, is_coalesced=True)
    steps: Tensor = torch.sparse.mm(moves, rows.T).view(number, changes.group, -1)
    return steps.cumsum(dim=1).flatten(0, 1).T.contiguous()


class RememberedChanges(NamedTuple):
    """The differences of some groups that follow one another, held from one new token to the next.

    places int32 [nnz] (token * d + channel), ascending; much float32 [nnz]; products as in Changes. positions int
    [m * g] and sums float32 [m, d] of their keys: whether these are still the groups that the cache holds.
    """

    places: Tensor
    much: Tensor
    products: Tensor
    positions: Tensor
    sums: Tensor

    @classmethod
    def of(cls, blocks: Tensor, positions: Tensor, shape: DeltaShape) -> RememberedChanges:
        """Of groups [m, g, d] of float32 keys at positions [m * g]."""
        changes = _changes_in(blocks, shape)
        places = (changes.where[0] * blocks.shape[2] + changes.where[1]).to(torch.int32)
        return cls(places, changes.much, changes.products, positions.clone(), blocks.sum(dim=1))

    def still(self, blocks: Tensor, positions: Tensor) -> bool:
        """Whether groups that begin where these do are the same."""
        here = blocks[: len(self.sums)]
        return torch.equal(self.positions, positions[: len(self.positions)]) and torch.equal(self.sums, here.sum(dim=1))

    def changes(self, group: int) -> Changes:
        width = self.sums.shape[1]
        places = self.places.long()
        where = torch.stack([torch.div(places, width, rounding_mode="floor"), places % width])
        return Changes(where, self.much, self.products, group)


def updated(
    remembered: tuple[RememberedChanges, ...], keys: Tensor, positions: Tensor, number: int, shape: DeltaShape
) -> tuple[RememberedChanges, ...]:
    """The differences of the first `number` groups of float32 keys [n, d] at positions [n], of which those in
    `remembered` have been made before; what has changed since is made anew.
    """
    group = shape.group
    blocks, positions = keys[: number * group].view(number, group, keys.shape[1]), positions[: number * group]
    kept: list[RememberedChanges] = []
    done = 0
    for some in remembered:
        if not some.still(blocks[done:], positions[done * group :]):
            break
        kept.append(some)
        done += len(some.sums)
    if done < number:
        kept.append(RememberedChanges.of(blocks[done:], positions[done * group :], shape))
    return tuple(kept)


def over(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    old: Tensor,
    remembered: tuple[RememberedChanges, ...],
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
