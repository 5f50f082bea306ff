"""Codebooks: a few vectors that stand for many, each number of which matters to its own degree."""

from __future__ import annotations

import torch
from torch import Tensor

_POINTS = 64  # for each entry: as many of the points are looked at while a codebook is made


def codebook(points: Tensor, weights: Tensor, entries: int, *, rounds: int = 12, seed: int = 0) -> Tensor:
    """Entries [k, v] with a small sum of weights * (point - nearest entry)², for points and weights [p, v], float32.

    Lloyd's algorithm, begun at points drawn in proportion to how much is lost without them (weights * point²), on at
    most 64 points for each entry, drawn likewise but evenly. Entries that nothing is nearest to move to the points
    that are worst off. The same seed gives the same entries; the global random state is left alone.
    """
    draw = torch.Generator().manual_seed(seed)
    few = max(_POINTS * entries, 2048)
    if points.shape[0] > few:
        some = torch.randperm(points.shape[0], generator=draw)[:few].to(points.device)
        points, weights = points[some], weights[some]
    loss = (weights * points.square()).sum(dim=1).double().cpu() + 1e-30
    book = points[torch.multinomial(loss, entries, generator=draw).to(points.device)]
    weighted = weights * points
    for _ in range(rounds):
        index, distance = nearest(weighted, weights, book)
        totals = torch.zeros_like(book).index_add_(0, index, weights)
        sums = torch.zeros_like(book).index_add_(0, index, weighted)
        book = torch.where(totals > 0, sums / totals.clamp_min(1e-30), book)
        empty = (torch.bincount(index, minlength=entries) == 0).nonzero()[:, 0]
        if empty.numel():
            lost = distance + (weighted * points).sum(dim=1)
            book[empty] = points[lost.topk(empty.numel()).indices]
    return book


def nearest(weighted: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry of the book [k, v] is nearest to each point, int64 [p], and its distance [p] less what is the same
    for all entries: Σ weights * point².

    weights: [p, v]; weighted: weights * points.
    """
    sides = torch.cat([weighted, weights], dim=1)  # one product gives both terms of every distance
    entries = torch.cat([-2 * book, book.square()], dim=1).T
    size = max(2**24 // book.shape[0], 1)
    best = [(part @ entries).min(dim=1) for part in sides.split(size)]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])
