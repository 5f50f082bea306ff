"""Where the values of some rows begin, known without waiting for a GPU."""

from __future__ import annotations

from torch import Tensor

from workbench.weights.layers.compact import MARK


def marks(starts: Tensor) -> tuple[int, ...]:
    """Where the values of every `MARK`-th row begin, and where all end. starts: integers [o + 1], of every row."""
    return (*starts[:-1:MARK].tolist(), int(starts[-1]))


def starting(starts: Tensor, known: tuple[int, ...], row: int) -> int:
    """Where the values of a row begin: among `marks`, or else read from the tensor, which waits for its device."""
    if row == starts.numel() - 1:
        return known[-1]
    return int(starts[row]) if row % MARK else known[row // MARK]
