"""Meeting a budget with what a store can vary, where every token is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from workbench.kv.stores.format import Format, Shape, stored_nbytes

_MILD = 0.8  # beyond this share the exact window is shortened first


def first_fitting(formats: Iterable[Format], shapes: Sequence[Shape], limit: int) -> Format:
    """The first of the formats, best first, in which layers of these shapes take at most `limit` bytes, every entry
    kept; the last if none does.
    """
    everything = torch.tensor([[shape.tokens] * shape.kv_heads for shape in shapes])
    form = None
    for form in formats:
        if stored_nbytes(form, shapes, everything) <= limit:
            break
    assert form is not None, "no format to choose from"
    return form


def pruning_steps(widest: int, recent: int) -> Iterator[tuple[float, int]]:
    """Shares of `widest` numbers to prune, each with a window of exact tokens, best first.

    Up to four fifths are pruned before the window is halved, and more only when it is gone.
    """
    mild = [step / widest for step in range(1, widest) if step <= _MILD * widest]
    for window in halvings(recent):
        yield from ((share, window) for share in mild)
    yield from ((step / widest, 0) for step in range(len(mild) + 1, widest))


def halvings(most: int) -> Iterator[int]:
    """`most`, its half and so on, down to 0."""
    while most:
        yield most
        most //= 2
    yield 0
