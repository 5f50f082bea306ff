"""Attention whose values, or queries and keys, are narrower than its config says."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

# Classes whose attention is: project, perhaps normalise, rotate, attend, project.
_KNOWN = (
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
)


def known_attention(module: nn.Module) -> bool:
    """Whether NarrowAttention computes what this module does."""
    return type(module).__name__ in _KNOWN or isinstance(module, NarrowAttention)


class NarrowAttention(nn.Module):
    """Attention of a known class with values (and so attention outputs) of any width, and queries and keys of any pairs
    of channels that are rotated together.

    value_channels int64 [k, dv]: which channels of the original values these are, or, where each is a mixture of them,
    their numbers. key_channels int32 [k, dk]: which channels of the original queries and keys these are, the first
    halves of the pairs and then the second ones; each keeps its rotation. None: all.
    """

    value_channels: Tensor
    key_channels: Tensor | None

    def __init__(
        self,
        original: nn.Module,
        v_proj: nn.Linear,
        o_proj: nn.Linear,
        value_channels: Tensor,
        key_channels: Tensor | None = None,
    ) -> None:
        super().__init__()
        source: Any = original
        self.config, self.layer_idx = source.config, source.layer_idx
        self.head_dim, self.scaling = source.head_dim, source.scaling
        self.num_key_value_groups, self.is_causal = source.num_key_value_groups, source.is_causal
        self.attention_dropout = source.attention_dropout
        self.sliding_window = getattr(source, "sliding_window", getattr(source.config, "sliding_window", None))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = source.q_proj, source.k_proj, v_proj, o_proj
        self.q_norm, self.k_norm = getattr(source, "q_norm", None), getattr(source, "k_norm", None)
        self.value_channels = value_channels  # no buffer: nothing is computed with it
        if key_channels is None:
            key_channels = getattr(original, "key_channels", None)
        self.register_buffer("key_channels", key_channels)
        # The original's own functions, found where its class was written.
        self.code: str = original.code if isinstance(original, NarrowAttention) else type(original).__module__
        self.train(original.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [b, n, hidden] to the same; the rest as transformers' attention layers take it."""
        shape = hidden_states.shape[:-1]
        kv_heads = self.value_channels.shape[0]
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states).view(*shape, kv_heads, -1)
        query = query.view(*shape, -1, key.shape[-1])
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(hidden_states).view(*shape, kv_heads, -1).transpose(1, 2)  # [b, k, n, dv]
        code: Any = sys.modules[self.code]
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        channels = getattr(self, "key_channels", None)  # folders of earlier versions know none
        if channels is None:
            query, key = code.apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            cos, sin = (x[..., channels].transpose(1, 2) for x in position_embeddings)  # [b, k, n, dk]
            key = key * cos + code.rotate_half(key) * sin
            cos, sin = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (cos, sin))
            query = query * cos + code.rotate_half(query) * sin
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = code.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # noqa: SLF001  as its own class asks for it
            code.eager_attention_forward,
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1)), weights
