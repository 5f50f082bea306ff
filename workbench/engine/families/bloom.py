"""Bloom: a fused projection for each head, and scores with ALiBi.

In 16 bits the model itself rounds scores with the slopes in them, to steps that grow with the text. That is not
imitated: scores are float32 here, and logits of long texts nearer to those of the same weights in float32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend
from workbench.engine.families.alibi import slopes


def _forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor | None,  # noqa: ARG001  (made of the slopes below)
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    query, key, value = fused.permute(3, 0, 2, 1, 4)  # [1, h, n, d] each
    out, weights = attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.inv_norm_factor,
        slopes=slopes(module.num_heads, query.device),
    )
    return residual + module.dense(out.flatten(2)), weights


def _no_bias(module: Any, attend: Attend, attention_mask: Tensor, num_heads: int, dtype: Any) -> None:
    """A bias over the tokens of one pass, for masks of two dimensions, is no use here."""


ATTENTION = Adapter(
    "forward", ("query_key_value", "dense", "num_heads", "head_dim", "inv_norm_factor", "layer_idx"), _forward
)
DECODER = Adapter("build_alibi_tensor", (), _no_bias)
