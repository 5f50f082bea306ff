"""Attention of a few queries over whatever a store holds."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_BYTES = 64 << 20  # score rows are worked on in blocks of about this size


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    softcap: float | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with grouped queries.

    query [h, q, d], keys [k, m, d], values [k, m, dv] with h = g * k, all of one dtype. visible: bool, broadcastable to
    [k, q, m], True where a query may look; None: everywhere. Every query must see at least one key.
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
        scores = torch.matmul(part.flatten(1, 2), keys.transpose(1, 2)).float().mul_(scale)  # [k, g*q, m]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(kv_heads, groups, -1, slots)
        if seen is not None:
            scores = scores.masked_fill_(~seen[:, None], float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        out = torch.matmul(probs.flatten(1, 2).to(values.dtype), values)  # [k, g*q, dv]
        outs.append(out.view(heads, part.shape[2], values.shape[-1]))
        if weights:
            rows.append(probs)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out, (torch.cat(rows, dim=2) if weights else None)
