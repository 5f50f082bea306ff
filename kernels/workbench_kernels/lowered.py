"""Scores of a stretch of keys drawn together, so that their largest falls by as much as is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import on_gpu, with_kernel
from workbench_kernels.rows import PackedRows
from workbench_kernels.scoring import Scoring

_EPSILON = 1e-8


def share_of(low: Tensor, high: Tensor, drop: float) -> Tensor:
    """By what scores between low and high are multiplied, seen from the lowest, for the highest to fall by `drop`.

    Where they span less all fall to the lowest: their order is never turned round.
    """
    span = high - low
    return ((span - drop) / (span + _EPSILON)).clamp_min(0)


def _takes(query: Tensor, keys: PackedRows, scoring: Scoring) -> bool:
    alike = keys.axis == "channel" and keys.group >= keys.codes.longest and keys.zero is not None
    here = on_gpu(query, keys.codes.data) and query.dtype.itemsize == 2 and scoring.in_kernels
    return alike and here and keys.balance is None and scoring.softcap is None and keys.tail.longest == 0


@with_kernel("gpu.lowered:lowered_query", when=_takes)
def lowered_query(query: Tensor, keys: PackedRows, scoring: Scoring, drop: float) -> tuple[Tensor, Tensor]:
    """What lowers the scores of query [h, q, d] with all keys: low + (score - low) * share of each query (`share_of`).

    Returns the query times its share, in its dtype, and what its scores have to be raised by, float32 [h, q]. Scores
    are products alone: no softcap. A head that holds no key gives its query back, and zero.
    """
    key, real = keys.padded()
    grouped = query.float().unflatten(0, (len(key), -1))
    scores = torch.einsum("kgqd,kmd->kgqm", grouped, key.float()) * scoring.scale
    seen = real[:, None, None]
    low = scores.masked_fill(~seen, torch.inf).amin(dim=-1)
    high = scores.masked_fill(~seen, -torch.inf).amax(dim=-1)
    some = real.any(dim=-1)[:, None, None]
    share = torch.where(some, share_of(low, high, drop), 1.0)
    raised = torch.where(some, low, 0.0) * (1 - share)
    return (grouped * share[..., None]).to(query.dtype).flatten(0, 1), raised.flatten(0, 1)
