"""Large arrays made as small as the screen."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def edges(size: int, pixels: int) -> NDArray[np.int64]:
    """Where each of at most `pixels` bins starts along an axis of `size`: ascending, all bins non-empty."""
    bins = max(1, min(size, pixels))
    return np.arange(bins, dtype=np.int64) * size // bins


def pool_map(
    values: NDArray[np.floating[Any]], pixels: int, how: Literal["max", "mean"] = "max"
) -> NDArray[np.float32]:
    """A map [rows, columns] with at most `pixels` rows and columns; NaN says nothing there and is left out of every
    bin.
    """
    pooled = np.asarray(values, dtype=np.float32)
    if max(pooled.shape, default=0) <= pixels:
        return pooled
    if how == "max":
        for axis in (0, 1):
            pooled = np.fmax.reduceat(pooled, edges(pooled.shape[axis], pixels), axis=axis)
        return pooled
    there = np.isfinite(pooled).astype(np.float32)
    total = np.where(there > 0, pooled, 0)
    for axis in (0, 1):
        cuts = edges(pooled.shape[axis], pixels) if axis == 0 else edges(values.shape[1], pixels)
        total, there = np.add.reduceat(total, cuts, axis=axis), np.add.reduceat(there, cuts, axis=axis)
    return np.where(there > 0, total / np.maximum(there, 1), np.nan).astype(np.float32)


def pool_tiers(tiers: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Tiers [rows, n] pooled along positions to [2, rows, pixels]: the most frequent kept tier, and the share kept in
    0..255.
    """
    cuts = edges(tiers.shape[1], pixels)
    width = np.diff(np.append(cuts, tiers.shape[1]))
    counts = np.stack(
        [
            np.add.reduceat(tiers == tier, cuts, axis=1, dtype=np.int32)
            for tier in range(1, int(tiers.max(initial=1)) + 1)
        ]
    )
    kept = counts.sum(axis=0)
    tier = np.where(kept > 0, counts.argmax(axis=0) + 1, 0)
    share = np.ceil(kept * 255 / width)  # rounded up: one kept position among thousands stays visible
    return np.stack([tier, share]).astype(np.uint8)
