"""A few tokens that stand for all: means over segments of the past, thinned out as it grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Epoch(NamedTuple):
    """A run of positions that see the same landmarks."""

    start: int
    stop: int
    members: tuple[int, ...]
    """which segments stand for the past of these positions; (-1,): the first token alone"""


def epochs(tokens: int, segment: int, most: int) -> Iterator[Epoch]:
    """How the landmarks of positions 0 .. tokens - 1 change.

    A segment of `segment` tokens becomes a landmark with its last token. Where there would be more than `most` of them,
    only every second stays, then every fourth, and so on: at each position they lie evenly over its past, a new one
    comes ever more rarely, and what a position sees never depends on what follows it. Before the first segment is
    complete, the first token is the landmark.
    """
    start, members = 0, _evenly(0, most)
    for complete in range(tokens // segment + 1):
        first = max(complete * segment - 1, 0)  # the first position that sees so many segments
        now = _evenly(complete, most)
        if now != members:
            if first > start:
                yield Epoch(start, first, members)
            start, members = first, now
    if tokens > start:
        yield Epoch(start, tokens, members)


def means(x: Tensor, segment: int, members: tuple[int, ...]) -> Tensor:
    """The landmarks: the mean of x [h, n, d] over each of these segments, [h, m, d] in the precision of x."""
    if members == (-1,):
        return x[:, :1]
    at = torch.tensor(members, device=x.device)[:, None] * segment + torch.arange(segment, device=x.device)
    return x[:, at].mean(2)


def _evenly(complete: int, most: int) -> tuple[int, ...]:
    if complete == 0:
        return (-1,)
    stride = 1
    while -(-complete // stride) > most:
        stride *= 2
    return tuple(range(0, complete, stride))
