"""GPT-J, and CodeGen, which has its attention: queries and keys come rotated, partly, in pairs of neighbours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


def _attn(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    # The rotation's table is float32 in some checkpoints; the model's own cache holds keys in the layer's precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out, weights = attend(module, query, key, value, attention_mask, scaling=1 / module.scale_attn)
    return out.transpose(1, 2), weights


ATTENTION = Adapter("_attn", ("scale_attn", "layer_idx"), _attn)
