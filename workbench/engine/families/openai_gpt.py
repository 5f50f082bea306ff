"""The first GPT: keys come transposed, causality is a buffer of its own, and it has no cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.engine.families.adapter import Adapter, Attend


def _attn(
    module: Any,
    attend: Attend,
    q: Tensor,
    k: Tensor,  # [1, h, d, n]
    v: Tensor,
    attention_mask: Tensor | None = None,  # noqa: ARG001  (of padding, which is none)
    output_attentions: bool = False,  # noqa: ARG001
) -> list[Tensor]:
    out, _ = attend(module, q, k.transpose(2, 3), v, None, scaling=v.shape[-1] ** -0.5 if module.scale else 1.0)
    return [out.transpose(1, 2)]


ATTENTION = Adapter("_attn", ("scale", "bias"), _attn)
