"""GPT-NeoX Japanese: GPT-NeoX as it was before transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


def _attn(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    out, weights = attend(module, query, key, value, attention_mask, scaling=1 / module.norm_factor)
    return out.transpose(1, 2), weights


ATTENTION = Adapter("_attn", ("norm_factor", "layer_idx"), _attn)
