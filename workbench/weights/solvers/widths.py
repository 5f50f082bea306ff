"""How wide modules become within a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workbench.core.bisection import boundary

_NARROWEST = 0.01  # of a module's width: narrower levels on the way to 1 would hardly save anything


def shared_out(
    shares: Sequence[float], widths: Sequence[int], nbytes: Callable[[int, int], int], limit: int
) -> list[int]:
    """How many dimensions each module keeps so that all together take at most `limit` bytes, and nearly that.

    Each keeps its width times its share times a number that is the same for all, at least one and at most all; what is
    left over goes to those whose share was rounded down most. nbytes: of which module at which width. One dimension of
    each has to fit.
    """

    def at(scale: float) -> list[int]:
        wanted = (int(scale * share * width + 1e-9) for share, width in zip(shares, widths, strict=True))
        return [min(max(count, 1), width) for count, width in zip(wanted, widths, strict=True)]

    def total(counts: Sequence[int]) -> int:
        return sum(nbytes(index, count) for index, count in enumerate(counts))

    everything = 1 / max(min(shares), 1e-6)
    if total(at(everything)) <= limit:
        return at(everything)
    scale = boundary(lambda scale: total(at(scale)) <= limit, 0.0, everything, steps=50)
    counts = at(scale)
    rest = [scale * share * width - count for share, width, count in zip(shares, widths, counts, strict=True)]
    room = limit - total(counts)
    for index in sorted(range(len(counts)), key=lambda index: -rest[index]):
        more = nbytes(index, counts[index] + 1) - nbytes(index, counts[index])
        if counts[index] < widths[index] and more <= room:
            counts[index] += 1
            room -= more
    return counts


def ladders(widths: Sequence[int], shrink: float) -> list[list[int]]:
    """The widths that each module can have, as many of each: all of it first, then `shrink` times the one before,
    and 1 last, after about a hundredth.

        >>> ladders([8, 3], 0.5)
        [[8, 4, 2, 1], [3, 2, 1, 1]]
    """
    found = []
    for width in widths:
        row = [width]
        while (narrower := min(round(row[-1] * shrink), row[-1] - 1)) > max(_NARROWEST * width, 1):
            row.append(narrower)
        found.append([*row, 1])
    longest = max(map(len, found))
    return [row + [1] * (longest - len(row)) for row in found]
