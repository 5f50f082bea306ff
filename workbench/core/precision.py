"""Numbers in a narrower form: checked, so that none becomes infinite in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import OutOfRange

_WIDE = 1e30  # forms that reach further have a place for whatever a model computes


def narrow(dtype: torch.dtype) -> bool:
    """Whether a form of numbers with a point ends below what a model may compute: float16 and float8 do."""
    return dtype.is_floating_point and torch.finfo(dtype).max < _WIDE


def checked(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x as `dtype`. what: x in words ("its scales").

    Raises OutOfRange, naming the largest number and where the form ends, where one is beyond that, infinite or no
    number. On a GPU this waits for the device: it is for what is built once.
    """
    made = x.to(dtype)
    if narrow(dtype) and not made.is_meta:
        check_finite(made, x, what)
    return made


def half(x: Tensor, what: str) -> Tensor:
    """x as a contiguous float16 copy, checked."""
    return checked(x.detach(), torch.float16, what).clone(memory_format=torch.contiguous_format)


def sixteen(x: Tensor, what: str) -> Tensor:
    """x as a contiguous copy at 16 bits: in its own form where that has so many, else as float16, checked."""
    return checked(x.detach(), x.dtype if x.dtype.itemsize == 2 else torch.float16, what).clone(
        memory_format=torch.contiguous_format
    )


def appended(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x as `dtype`, checked where that waits for nothing: on a GPU, what is appended step by step is not."""
    return x.to(dtype) if x.is_cuda else checked(x, dtype, what)


def check_finite(made: Tensor, x: Tensor, what: str) -> None:
    """Raise OutOfRange where a number of `made`, a narrower form of x, is not finite."""
    if bool(made.isfinite().all()):
        return
    name, most = str(made.dtype).removeprefix("torch."), torch.finfo(made.dtype).max
    if bool(x.isnan().any()):
        raise OutOfRange(f"{what} hold what is not a number")
    raise OutOfRange(f"{what} reach {float(x.abs().max()):.4g}, and {name} ends at {most:,.0f}")
