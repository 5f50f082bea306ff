"""Softmax weights that one layer leaves for others to use."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised


class SharedRows(NamedTuple):
    """Rows of the shared weights [h, r, keys]."""

    rows: slice
    keys: slice
    weights: Tensor


class SharedStep(NamedTuple):
    """The weights [h, q, m] that `layer` gave to what it holds, at positions [k or 1, m]."""

    layer: int
    weights: Tensor
    positions: Tensor


def within(block: SharedRows, window: int | None, *, sunk: bool = False) -> Tensor:
    """The weights, of which those outside a narrower window go to the others; sunk: sinks have what rows lack to 1."""
    rows, keys, weights = block
    if window is None or keys.start > rows.stop - 1 - window:  # all rows see all of these keys
        return weights
    at_row = torch.arange(rows.start, rows.stop, device=weights.device)[:, None]
    outside = torch.arange(keys.start, keys.stop, device=weights.device) <= at_row - window
    got = 1 - weights.sum(dim=-1, keepdim=True) if sunk else 0
    weights = weights.masked_fill(outside, 0)
    return weights / (weights.sum(dim=-1, keepdim=True) + got).clamp_min(torch.finfo(weights.dtype).tiny)


def moved(step: SharedStep, positions: Tensor) -> Tensor:
    """The weights for entries at positions [k or 1, m]: what the other layer gave to the same tokens, else nothing."""
    if step.positions.shape == positions.shape and torch.equal(step.positions, positions):
        return step.weights
    heads, rows, _ = step.weights.shape

    def index(at: Tensor) -> Tensor:
        return at.long().repeat_interleave(heads // len(at), dim=0)[:, None].expand(-1, rows, -1)

    last = max(int(step.positions.max()), int(positions.max()))
    spread = step.weights.new_zeros(heads, rows, last + 1)
    return spread.scatter_add_(2, index(step.positions), step.weights).gather(2, index(positions))


def compensation(value: Tensor, lost: Tensor) -> Tensor:
    """What of an output `lost` [h, n, dv] is linear in a layer's values [k, n, dv]: float32 [k * dv, h * dv]."""
    side_by_side = (x.double().transpose(0, 1).flatten(1) for x in (value, lost))  # [n, k * dv] and [n, h * dv]
    given: Tensor = torch.linalg.pinv(next(side_by_side)) @ next(side_by_side)
    return given.float()


def newest_values(contents: Dequantised, positions: Tensor) -> Tensor:
    """The values [k, q, dv] that are held of the tokens at positions [q]."""
    held = contents.positions.expand(len(contents.values), -1)  # [k, m]
    slots = (held[:, None] == positions.to(held.device)[:, None]).byte().argmax(dim=-1)  # [k, q]
    return contents.values.gather(1, slots[..., None].expand(-1, -1, contents.values.shape[-1]))
