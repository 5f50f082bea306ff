"""Layers that can each be larger or smaller: in which order they grow, when bytes are to be spent where they help."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Rung(NamedTuple):
    """One size of a layer: its bytes, and the share of its outputs' mean square that is lost at this size."""

    nbytes: int
    error: float


Ladders = Mapping[str, Sequence[Rung]]  # of each layer its sizes, from the smallest


def order(ladders: Ladders) -> list[str]:
    """The layers in the order in which they go up, once for each step: next is whichever gains most error per byte.

    The order knows no budget. Where each ladder's gains per byte fall from step to step, no other way to spend as many
    bytes leaves a smaller sum of errors. Of equal gains, the earlier layer's comes first.
    """
    places = {name: place for place, name in enumerate(ladders)}

    def step(name: str, level: int) -> list[tuple[float, int, str, int]]:
        rungs = ladders[name]
        if level + 1 >= len(rungs):
            return []
        now, then = rungs[level : level + 2]
        return [(-(now.error - then.error) / (then.nbytes - now.nbytes), places[name], name, level)]

    waiting = [found for name in ladders for found in step(name, 0)]
    heapq.heapify(waiting)
    climbed = []
    while waiting:
        _, _, name, level = heapq.heappop(waiting)
        climbed.append(name)
        for found in step(name, level + 1):
            heapq.heappush(waiting, found)
    return climbed


def levels(ladders: Ladders, climbing: Sequence[str], limit: int) -> dict[str, int]:
    """Each layer's size (its place on the ladder) after the longest beginning of `climbing` that takes at most `limit`
    bytes; all are at 0 where not even one step fits.
    """
    found = dict.fromkeys(ladders, 0)
    total = sum(rungs[0].nbytes for rungs in ladders.values())
    for name in climbing:
        rungs, level = ladders[name], found[name]
        total += rungs[level + 1].nbytes - rungs[level].nbytes
        if total > limit:
            break
        found[name] += 1
    return found
