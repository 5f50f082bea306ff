"""Attention of a few queries over whatever a store holds."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.scoring import Scoring
from workbench_kernels.softmax import attention_weights

_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size
_PART, _FEW_ROWS = 512, 64  # of a sum in parts: slots in each, and rows up to which it is made so


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    *,
    visible: Tensor | None = None,
    offsets: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with grouped queries.

    query [h, q, d], keys [k, m, d], values [k, m, dv] with h = g * k, all of one dtype. visible: bool, broadcastable to
    [k, q, m], True where a query may look; None: everywhere. Every query must see at least one key. Slots have no
    positions here, so of `scoring` the window is not looked at: `visible` says what is seen. offsets int [k or 1, m],
    where there are slopes: how far keys stand ahead of one of the queries (`Scoring.offsets`).
    Returns the output [h, q, dv] and, if `weights`, the softmax rows [k, g, q, m] (float32), else None.
    """
    heads, count, width = query.shape
    kv_heads, slots, _ = keys.shape
    groups = heads // kv_heads
    grouped = query.reshape(kv_heads, groups, count, width)
    block = max(1, _ROWS_BYTES // (4 * heads * max(slots, 1)))
    outs, rows = [], []
    for first in range(0, count, block):
        part = grouped[:, :, first : first + block]
        seen = None if visible is None else visible[:, first : first + block]
        products = torch.matmul(part.flatten(1, 2), keys.transpose(1, 2)).float()  # [k, g*q, m]
        probs = attention_weights(
            products.view(kv_heads, groups, -1, slots),
            scoring,
            None if seen is None else seen[:, None],
            None if offsets is None else offsets[:, None, None],
        )
        out = _weighted(probs.flatten(1, 2).to(values.dtype), values)  # [k, g*q, dv]
        outs.append(out.view(heads, part.shape[2], values.shape[-1]))
        if weights:
            rows.append(probs)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out, (torch.cat(rows, dim=2) if weights else None)


def _weighted(probs: Tensor, values: Tensor) -> Tensor:
    """Sums of values [k, m, dv] weighted by probs [k, r, m]: [k, r, dv].

    A GPU's product of few rows gives each sum to one processor, however long it is. So long ones are made in parts.
    """
    rows, slots = probs.shape[1:]
    parts = slots // _PART
    if not probs.is_cuda or rows > _FEW_ROWS or parts < 2:
        return torch.matmul(probs, values)
    even = parts * _PART
    weights = probs[..., :even].unflatten(2, (parts, _PART)).transpose(1, 2)  # [k, p, r, c]
    sums = torch.matmul(weights, values[:, :even].unflatten(1, (parts, _PART)))
    out = sums.sum(dim=1, dtype=torch.promote_types(values.dtype, torch.float32))
    if even < slots:
        out += torch.matmul(probs[..., even:], values[:, even:])
    return out.to(values.dtype)
