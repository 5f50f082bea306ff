"""Telling, before a CUDA graph is captured, whether a step would have to wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import NotApplicable


class NoWaiting(TorchDispatchMode):
    """Raises NotApplicable at an operation on a device whose result the host has to wait for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self._kind = device.type

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name in _COPIES and _crosses(args, kwargs or {}):
            raise NotApplicable("something is copied between host memory and the device in the midst of a token")
        picked = args[1] if name in ("aten::index.Tensor", "aten::index_put", "aten::index_put_") else ()
        there = any(isinstance(x, torch.Tensor) and x.device.type == self._kind for x in args)
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in picked)
        if there and (name in _WAITING or masked):
            raise NotApplicable(f"the device is waited for in the midst of a token ({name})")
        return func(*args, **(kwargs or {}))


_COPIES = {"aten::_to_copy", "aten::copy_"}


def _crosses(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy is from host memory to the device, or back."""
    there = kwargs.get("device") or (args[1].device if len(args) > 1 and isinstance(args[1], torch.Tensor) else None)
    return there is not None and {args[0].device.type, torch.device(there).type} == {"cpu", "cuda"}


_WAITING = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere", "where", "masked_select",
        "_unique2", "unique_dim", "unique_consecutive", "bincount", "histc", "equal", "allclose",
        "repeat_interleave.Tensor", "repeat_interleave.self_Tensor",
    )
}  # fmt: skip
