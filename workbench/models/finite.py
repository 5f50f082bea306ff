"""Weights are numbers: one that is not finite is named before anything is computed with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from workbench.errors import CheckpointRefused

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_finite(place: str, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Raise CheckpointRefused, with the name, if one of the weights (of `dtype` now) has a NaN or an infinity."""
    import torch

    for name, weight in weights:
        # A sum is finite only where all its terms are; one that overflows by itself is looked at again, term by term.
        if not weight.is_floating_point() or weight.device.type == "meta" or torch.isfinite(weight.sum()):
            continue
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            cause = (
                "numbers above 65,504 do not fit into float16: load it with dtype bfloat16 or float32, or"
                if dtype == torch.float16
                else "the file is damaged or the model was:"
            )
            raise CheckpointRefused(
                f"{place}: {name} holds {bad:,} values that are NaN or infinite ({cause} download it again)"
            )
