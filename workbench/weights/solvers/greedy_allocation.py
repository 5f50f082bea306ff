"""Greedy allocation: in which order layers that can each be larger or smaller grow, when bytes are to be spent where
they help.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """One size of a layer: its bytes, and the share of its outputs' mean square that is lost at this size."""

    nbytes: int
    error: float


Sizes = Mapping[str, Sequence[Size]]  # of each layer, from the smallest


def growth_order(sizes: Sizes) -> list[str]:
    """The layers in the order in which they grow, once for each step: next is whichever gains most error per byte.

    The order knows no budget. Where each layer's gains per byte fall from step to step, no other way to spend as many
    bytes leaves a smaller sum of errors. Of equal gains, the earlier layer's comes first.
    """
    places = {name: place for place, name in enumerate(sizes)}

    def step(name: str, index: int) -> list[tuple[float, int, str, int]]:
        if index + 1 >= len(sizes[name]):
            return []
        now, then = sizes[name][index : index + 2]
        return [(-(now.error - then.error) / (then.nbytes - now.nbytes), places[name], name, index)]

    waiting = [gain for name in sizes for gain in step(name, 0)]
    heapq.heapify(waiting)
    order = []
    while waiting:
        _, _, name, index = heapq.heappop(waiting)
        order.append(name)
        for gain in step(name, index + 1):
            heapq.heappush(waiting, gain)
    return order


def level_order(after: Mapping[str, Sequence[float]]) -> list[str]:
    """The layers in the order in which they grow when all take their first step before any takes its second.

    after: for each layer and step, how bad it is once that is taken and all others are a step behind; of each round,
    the smallest comes first, of equals the earlier.
    """
    rounds = range(max(map(len, after.values()), default=0))
    return [
        name
        for step in rounds
        for name in sorted((name for name in after if len(after[name]) > step), key=lambda name: after[name][step])
    ]


def sizes_within(sizes: Sizes, order: Sequence[str], limit: int) -> dict[str, int]:
    """The place of each layer's size after the longest beginning of `order` that takes at most `limit` bytes; all are
    at 0 where not even one step fits.
    """
    places = dict.fromkeys(sizes, 0)
    total = sum(layer[0].nbytes for layer in sizes.values())
    for name in order:
        layer, place = sizes[name], places[name]
        total += layer[place + 1].nbytes - layer[place].nbytes
        if total > limit:
            break
        places[name] += 1
    return places
