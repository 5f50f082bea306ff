"""MPT: a fused projection, whose results may be clipped, and scores with ALiBi."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


def _forward(
    module: Any,
    attend: Attend,
    hidden_states: Tensor,
    position_bias: Tensor | None,  # [h, 1, the most positions]: 0 for the last, a slope less for each one before
    past_key_values: Any = None,  # noqa: ARG001
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    slopes = None if position_bias is None else -position_bias[:, 0, -2]
    out, weights = attend(module, query, key, value, attention_mask, scaling=module.softmax_scale, slopes=slopes)
    return module.out_proj(out.flatten(2)), weights


ATTENTION = Adapter("forward", ("Wqkv", "out_proj", "n_heads", "head_dim", "softmax_scale", "clip_qkv"), _forward)
