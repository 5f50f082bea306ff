"""k-means, seeded: a few centres for many points."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100  # of Lloyd's algorithm at most; it stops when no point changes


def kmeans(points: Tensor, clusters: int, *, seed: int = 0, restarts: int = 10) -> tuple[Tensor, Tensor]:
    """At most `clusters` centres float64 [c, d] of points [n, d], and the centre nearest to each point, int64 [n].

    Lloyd's algorithm from `restarts` k-means++ beginnings, of which the one with the smallest sum of squared distances
    is returned. No centre is without points, so that fewer may be found, for instance of equal points. The same seed
    gives the same centres; the global random state is left alone.
    """
    data = points.detach().double().cpu()
    draw = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(restarts):
        spread, centres, nearest = _lloyd(data, _beginning(data, clusters, draw))
        if best is None or spread < best[0]:
            best = spread, centres, nearest
    assert best is not None
    used, nearest = best[2].unique(return_inverse=True)
    return best[1][used], nearest


def _beginning(data: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """k-means++: points drawn one after the other, in proportion to the squared distance from those drawn so far."""
    chosen = [int(torch.randint(len(data), (1,), generator=draw))]
    distance = _squared(data, data[chosen])[:, 0]
    while len(chosen) < clusters and float(distance.sum()) > 0:
        chosen.append(int(torch.multinomial(distance, 1, generator=draw)))
        distance = torch.minimum(distance, _squared(data, data[chosen[-1:]])[:, 0])
    return data[chosen]


def _lloyd(data: Tensor, centres: Tensor) -> tuple[float, Tensor, Tensor]:
    """The sum of squared distances, the centres and the nearest of them, once no point changes."""
    nearest = _squared(data, centres).argmin(dim=1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, nearest, data)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        before, nearest = nearest, _squared(data, centres).argmin(dim=1)
        if torch.equal(before, nearest):
            break
    return float((data - centres[nearest]).square().sum()), centres, nearest


def _squared(data: Tensor, centres: Tensor) -> Tensor:
    """Squared distances of points [n, d] from centres [c, d], [n, c]; exactly zero between equal ones."""
    return torch.stack([(data - centre).square().sum(dim=1) for centre in centres], dim=1)
