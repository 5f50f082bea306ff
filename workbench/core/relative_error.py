"""Errors relative to what they are errors of."""

from __future__ import annotations

import math

from torch import Tensor


def relative_error(found: Tensor, want: Tensor) -> float:
    """The norm of found - want over that of `want`, in float32; not a number where `want` is zero: any error is then
    infinitely large, and none says anything.
    """
    plain = want.detach().float()
    return ratio(float((found.detach().to(plain.device).float() - plain).norm()), float(plain.norm()))


def ratio(part: float, whole: float) -> float:
    """part / whole; not a number where the whole is zero."""
    return part / whole if whole else math.nan
