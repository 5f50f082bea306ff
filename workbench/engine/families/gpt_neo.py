"""GPT-Neo: every other layer sees a window, which a buffer of its own cuts; scores are not scaled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


def _attn(
    module: Any, attend: Attend, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    window = None
    if module.attention_type == "local":
        attention_mask, window = None, module.config.window_size  # the mask tells of no window
    out, weights = attend(module, query, key, value, attention_mask, scaling=1.0, sliding_window=window)
    return out.transpose(1, 2), weights


ATTENTION = Adapter("_attn", ("attention_type", "config.window_size", "is_causal"), _attn)
