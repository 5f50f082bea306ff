"""Values as 255 levels of a colour scale, with the true value of each level."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import BadParameter

Scale = Literal["linear", "log", "percentile"]
LEVELS = 255  # level 0 says that there is nothing here


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
