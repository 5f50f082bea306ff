"""Falcon: one fused projection for the heads of each KV head, which the model itself spreads over its query heads.

With ALiBi its decoder works slopes, rounded to steps of bfloat16, into its mask. Told to leave that it hands on a table
of rotations instead, which is not used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend
from workbench.engine.families.alibi import slopes
from workbench.errors import NotApplicable


def _forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    alibi: Tensor | None,  # noqa: ARG001  (given by name)
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    groups = module.num_kv_heads if module.new_decoder_architecture else 1 if module.multi_query else module.num_heads
    fused = module.query_key_value(hidden_states).unflatten(
        -1, (groups, -1, module.head_dim)
    )  # [1, n, k, h / k + 2, d]
    query, key, value = (
        x.transpose(1, 2) for x in (fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :])
    )
    steep = None
    if module.config.alibi:
        steep = _slopes(module, query.device)
    elif position_embeddings is not None:
        query, key = (_rotated(x, *position_embeddings) for x in (query, key))
    out, weights = attend(module, query, key, value, attention_mask, slopes=steep, rounded=steep is not None)
    return module.dense(out.flatten(2)), weights


def _slopes(module: Any, device: torch.device) -> Tensor:
    """[h]: times a position, rounded, they are the model's bias, which is rounded and divided then."""
    size: int = module.head_dim
    if size & (size - 1) or size.bit_length() % 2 == 0:
        raise NotApplicable(f"Falcon's ALiBi is exact for heads of 16, 64 or 256 channels only, not {size}")
    return slopes(module.num_heads, device).bfloat16().float() / math.sqrt(size)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, h, n, d] turned by (cos, sin) [1, n, d], its channels in halves, in its own precision."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


_HEADS = ("num_heads", "num_kv_heads", "head_dim", "new_decoder_architecture", "multi_query")
ATTENTION = Adapter("forward", ("query_key_value", "dense", "config.alibi", "layer_idx", *_HEADS), _forward)
DECODER = Adapter("use_alibi", value=False)
