"""Falcon: one fused projection for the heads of each KV head, which the model itself spreads over its query heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


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
    if position_embeddings is not None:
        query, key = (_rotated(x, *position_embeddings) for x in (query, key))
    out, weights = attend(module, query, key, value, attention_mask)
    return module.dense(out.flatten(2)), weights


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [1, h, n, d] turned by (cos, sin) [1, n, d], its channels in halves, in its own precision."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


ATTENTION = Adapter(
    "forward",
    ("query_key_value", "dense", "num_heads", "num_kv_heads", "head_dim", "new_decoder_architecture", "multi_query"),
    _forward,
)
