"""Large arrays made as small as the screen: pooling to pixels, and quantising to 255 levels."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import BadParameter

Scale = Literal["linear", "log", "percentile"]
LEVELS = 255  # level 0 says that there is nothing here


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


def scale_values(values: ArrayLike, scale: Scale = "linear") -> NDArray[np.float32]:
    """The true value of each of the 255 levels, ascending.

    `linear` spans lowest to highest; `log` spans the positive values, at most six decades below the highest;
    `percentile` spreads the levels evenly over the values that occur, so that every part of the distribution shows.
    """
    array = np.asarray(values, dtype=np.float32)
    array = array[np.isfinite(array)]
    if scale == "log":
        array = array[array > 0]
    if array.size == 0:
        return np.linspace(0, 1, LEVELS, dtype=np.float32)
    low, high = float(array.min()), float(array.max())
    if scale == "linear":
        return np.linspace(low, high, LEVELS, dtype=np.float32)
    if scale == "log":
        return np.geomspace(max(low, high * 1e-6), high, LEVELS, dtype=np.float32)
    if scale == "percentile":
        return np.quantile(array, np.linspace(0, 1, LEVELS)).astype(np.float32)
    raise BadParameter(f"no colour scale {scale!r}: use 'linear', 'log' or 'percentile'")


def scale_differences(values: ArrayLike, scale: Scale = "linear") -> NDArray[np.float32]:
    """The true value of each of the 255 levels of a difference, ascending and symmetric, zero in the middle.

    `scale` is that of the magnitudes; `log` shows four decades on either side.
    """
    sizes = np.abs(np.asarray(values, dtype=np.float32))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    side = LEVELS // 2
    if sizes.size == 0:
        up = np.linspace(0, 1, side + 1, dtype=np.float32)[1:]
    elif scale == "log":
        high = float(sizes.max())
        up = np.geomspace(max(float(sizes.min()), high * 1e-4), high, side, dtype=np.float32)
    elif scale == "percentile":
        up = np.quantile(sizes, np.linspace(0, 1, side)).astype(np.float32)
    elif scale == "linear":
        up = np.linspace(0, float(sizes.max()), side + 1, dtype=np.float32)[1:]
    else:
        raise BadParameter(f"no colour scale {scale!r}: use 'linear', 'log' or 'percentile'")
    return np.concatenate([-up[::-1], np.zeros(1, np.float32), up])


def quantise(values: ArrayLike, knots: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The level 1..255 whose true value in `knots` lies nearest; 0 where a value is not finite."""
    array = np.asarray(values, dtype=np.float32)
    levels = np.searchsorted((knots[1:] + knots[:-1]) / 2, array.ravel()).reshape(array.shape) + 1
    return np.where(np.isfinite(array), levels, 0).astype(np.uint8)
