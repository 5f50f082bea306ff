"""Exact causal attention over a whole prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.core.attention_rows import row_blocks
from workbench_kernels import Scoring


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention of query [h, n, d] over key [k, n, d], value [k, n, dv] at positions 0 .. n - 1: [h, n, dv].

    Memory grows with n, not n * n.
    """
    if scoring.chunk is not None:  # chunks do not see each other
        alone, parts = replace(scoring, chunk=None), (x.split(scoring.chunk, dim=1) for x in (query, key, value))
        return torch.cat([causal_attention(q, k, v, alone) for q, k, v in zip(*parts, strict=True)], dim=1)
    tokens, window = query.shape[1], scoring.window
    # On a CPU torch attends to values of another size than the keys' with all n * n weights in memory.
    in_blocks = query.device.type == "cpu" and value.shape[-1] != query.shape[-1]
    if scoring.plain and scoring.softcap is None and (window is None or window >= tokens) and not in_blocks:
        groups = query.shape[0] // key.shape[0]
        if tokens == 1:
            return value.repeat_interleave(groups, dim=0)
        return scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scoring.scale, enable_gqa=groups > 1
        )[0]
    out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
    groups = query.shape[0] // key.shape[0]
    for block in row_blocks(query, key, scoring):
        rows = block.probs.unflatten(0, (-1, groups)).flatten(1, 2).to(value.dtype)  # [k, g * rows, keys]
        out[:, block.rows] = (rows @ value[:, block.keys]).view(query.shape[0], -1, value.shape[-1])
    return out
