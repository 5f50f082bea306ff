"""Causal linear attention, chunk by chunk: what several operators have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attention.operators.base import chunks


def linear_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int, slopes: Tensor | None = None) -> Tensor:
    """sum over j <= i of exp(-slope * (i - j)) * (query_i . key_j) * value_j: [h, n, dv] float32.

    query, key: features [h, n, f]; value [h, n, dv]; slopes: [h], the decay of each head, by default none.
    Within a chunk the products are computed in full; what lies before it has gone into one state [f, dv] a head.
    """
    heads, tokens, width = query.shape
    out = torch.empty(heads, tokens, value.shape[-1], device=query.device)
    state = torch.zeros(heads, width, value.shape[-1], device=query.device)
    for first, stop in chunks(0, tokens, chunk):
        q, k, v = query[:, first:stop], key[:, first:stop], value[:, first:stop]
        inside = (q @ k.transpose(1, 2)).tril_()  # [h, c, c]
        if slopes is None:
            out[:, first:stop] = inside @ v + q @ state
            state = state + k.transpose(1, 2) @ v
            continue
        step = torch.arange(stop - first, device=query.device)
        fade = (-slopes[:, None] * step).exp()[..., None]  # [h, c, 1]: after 0, 1, ... c - 1 tokens
        more = (-slopes).exp()[:, None, None]
        inside *= decay(slopes, step, step)
        out[:, first:stop] = inside @ v + (q * fade * more) @ state
        state = state * fade[:, -1:] * more + (k * fade.flip(1)).transpose(1, 2) @ v
    return out


def decay(slopes: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """exp(-slope * (row - col)) for positions at or before the row, [h, r, c]; 1 after it."""
    distance = (rows[:, None] - cols).clamp_(min=0)
    return (-slopes[:, None, None] * distance).exp_()
