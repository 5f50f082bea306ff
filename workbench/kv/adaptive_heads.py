"""Room for the heads of a layer by the best scores of all its heads, each certain of a part of an equal split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workbench.kv.ranking import Ranking, places


def best_beyond_least(ranking: Ranking, entries: int, share: float) -> Tensor:
    """Every head keeps at least a `share` of an equal split, and the rest goes to the layer's best: int64 [l, k].

    What is certain counts against the total: the larger it is, the fewer of the layer's best are taken.
    """
    heads = ranking.kv_heads
    total = _of_a_layer(ranking, entries)
    certain = max(int(share * (total // heads)), 1)

    def counts(taken: Tensor) -> Tensor:  # [l] best entries of a layer taken -> [l, k] of each head
        return _taken(ranking, taken).clamp_min(certain)

    return adding_up(counts, torch.full((ranking.layers,), total))


def best_and_equal(ranking: Ranking, entries: int, share: float) -> Tensor:
    """A `share` of an equal split, and of what the layer's best alone would give the rest: int64 [l, k].

    What is certain to stay (a window, sinks; at least one entry) is no part of either: every head has it beforehand.
    Fractions are rounded so that a layer has its whole room, the largest remainders up.
    """
    heads, total = ranking.kv_heads, _of_a_layer(ranking, entries)
    certain = ranking.certain.clamp_min(1)  # [l, k]
    pool = total - certain.sum(dim=-1, keepdim=True)  # [l, 1]
    if bool((pool <= 0).any()):
        return best_beyond_least(ranking, entries, 0.0)
    best = _taken(ranking, torch.full((ranking.layers,), total))  # the certain come first
    beyond = share * (total / heads - certain.double()).clamp_min(0) + (1 - share) * (best - certain).clamp_min(0)
    beyond *= pool / beyond.sum(dim=-1, keepdim=True)  # 1, unless a head has more that is certain than an equal split
    whole = beyond.floor().long()
    spare = pool - whole.sum(dim=-1, keepdim=True)
    return certain + whole + (places(beyond - whole) < spare)


def adding_up(counts: Callable[[Tensor], Tensor], total: Tensor) -> Tensor:
    """The counts [g, heads] of as many of the best entries, taken [g], as add up to `total` [g]: int64.

    counts: what each head has of so many best, in which one more adds to one head or, where it has that many for
    certain, to none. So from above each step may go down by all that is too much, and never goes too far.
    """
    taken = total
    while True:
        found = counts(taken)
        over = (found.sum(dim=1) - total).clamp_min(0).minimum(taken)  # none left: what is certain is too much already
        if not over.any():
            return found
        taken = taken - over


def _of_a_layer(ranking: Ranking, entries: int) -> int:
    heads = ranking.kv_heads
    return min(max(entries // ranking.layers, heads), heads * ranking.tokens)


def _taken(ranking: Ranking, best: Tensor) -> Tensor:
    """How many of the best [l] entries of each layer are each head's: int64 [l, k]."""
    limits = best.to(ranking.in_layer.dtype)[:, None, None].expand(-1, ranking.kv_heads, 1).contiguous()
    return torch.searchsorted(ranking.in_layer, limits)[..., 0]
