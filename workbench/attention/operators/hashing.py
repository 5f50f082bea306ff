"""Kernel-based supervised hashing: signs of projected similarities, fitted so that like points get like codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

_RATE, _MOMENTUM = 5e-4, 0.9  # of the descent, as in EcoFormer's code


class Hash(NamedTuple):
    """Codes sign((near(x) - mean) @ projections), near(x) being exp(-|x - anchor|^2 / (2 spread)), one a head.

    anchors [h, a, d] of length one; spread float64 [h, 1, 1]; mean [h, 1, a] of each kind of points; projections
    [h, a, bits]. All float64, so that a sign does not hang on rounding.
    """

    anchors: Tensor
    spread: Tensor
    query_mean: Tensor
    key_mean: Tensor
    projections: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """Codes [h, n, bits] float32 of queries [h, n, d]."""
        return ((similarities(x, self.anchors, self.spread) - self.query_mean) @ self.projections).sign().float()

    def keys(self, x: Tensor) -> Tensor:
        """Codes [h, n, bits] float32 of keys [h, n, d]."""
        return ((similarities(x, self.anchors, self.spread) - self.key_mean) @ self.projections).sign().float()


def similarities(x: Tensor, anchors: Tensor, spread: Tensor) -> Tensor:
    """exp(-|x - anchor|^2 / (2 spread)) of the directions of x [h, n, d] and anchors [h, a, d]: [h, n, a]."""
    distance = 2 - 2 * normalize(x.double(), dim=-1) @ anchors.transpose(1, 2)
    return distance.div_(-2 * spread).exp_()


def fitted(query: Tensor, key: Tensor, drawn: Tensor, places: Tensor, like: int, steps: int) -> Hash:
    """A hash whose codes of queries are like those of the keys that they are most like, of query, key [h, n, d].

    drawn [a, bits]: the projections to begin from. places [a]: which points are anchors, the keys behind the queries.
    like: keys of a query that are to get its code, and as many least like it the opposite one. steps: of the descent.
    """
    query, key = (normalize(x.double(), dim=-1) for x in (query, key))
    points = torch.cat([query, key], dim=1)
    anchors = points[:, places]
    spread = (2 - 2 * points @ anchors.transpose(1, 2)).mean(dim=(1, 2), keepdim=True)
    near = [similarities(x, anchors, spread) for x in (query, key)]
    means = [x.mean(dim=1, keepdim=True) for x in near]
    wanted = affinity(query, key, like)
    projections = projected(near[0] - means[0], near[1] - means[1], wanted, drawn, steps)
    return Hash(anchors, spread, means[0], means[1], projections)


def affinity(query: Tensor, key: Tensor, like: int) -> Tensor:
    """What codes should agree, [h, n, n]: 1 for the `like` keys nearest to each query among those up to its own, -1 for
    as many farthest ones, 0 for others; of a query with fewer than twice as many, half of them each.
    """
    seen = torch.arange(1, query.shape[1] + 1, device=query.device)[:, None]
    later = torch.ones(len(seen), len(seen), dtype=torch.bool, device=query.device).triu_(1)
    products = (query @ key.transpose(1, 2)).masked_fill_(later, -torch.inf)
    rank = products.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    each = (seen // 2).clamp_max(like)
    return (rank < each).double() - ((rank >= seen - each) & ~later).double()


def projected(query: Tensor, key: Tensor, wanted: Tensor, drawn: Tensor, steps: int) -> Tensor:
    """Projections [h, a, bits] of similarities query, key [h, n, a] that make codes agree as wanted [h, n, n].

    One bit after the other: each lowers -(code of query) . wanted . (code of key) / (n bits) by descent, with a
    sigmoid in place of the sign, from where it was drawn, and stays there where that does not help; what the bit gives
    is taken off `wanted`, as in Liu et al. 2012 ("Supervised hashing with kernels").
    """
    bits, count = drawn.shape[1], query.shape[1]
    left, found = wanted * bits, []
    for bit in range(bits):
        start = drawn[:, bit].expand(len(query), -1)[..., None]  # [h, a, 1]
        here, speed = start, torch.zeros_like(start)
        for _ in range(steps):
            ours, theirs = (query @ here).div(2).tanh(), (key @ here).div(2).tanh()  # [h, n, 1]
            pull = query.transpose(1, 2) @ ((left @ theirs) * (1 - ours.square()))
            pull = pull + key.transpose(1, 2) @ ((left.transpose(1, 2) @ ours) * (1 - theirs.square()))
            slope = pull / (-2 * count * bits)
            speed = _MOMENTUM * speed + slope
            here = here - _RATE * (slope + _MOMENTUM * speed)  # Nesterov's
        better = _agreement(query, key, left, here) > _agreement(query, key, left, start)
        here = torch.where(better, here, start)
        left = left - (query @ here).sign() @ (key @ here).sign().transpose(1, 2)
        found.append(here)
    return torch.cat(found, dim=-1)


def _agreement(query: Tensor, key: Tensor, wanted: Tensor, projection: Tensor) -> Tensor:
    """How far the signs agree as wanted, [h, 1, 1]."""
    return (query @ projection).sign().transpose(1, 2) @ wanted @ (key @ projection).sign()
