"""Sizes of models that systems are shown on, under config.json's names, as their makers published them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _sizes(**sizes: Any) -> Mapping[str, Any]:
    return MappingProxyType(sizes)


LLAMA_8B = _sizes(  # Llama 3.1 8B
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
LLAMA_70B = _sizes(  # Llama 3.1 70B
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip
LLAMA2_7B = _sizes(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
LLAMA2_13B = _sizes(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40,
    vocab_size=32000, max_position_embeddings=131072,  # its rotation has no end; what it was trained for is 4,096
)  # fmt: skip
YI_34B = _sizes(  # Yi 34B, 200K
    hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56, num_key_value_heads=8,
    vocab_size=64000, max_position_embeddings=200000,
)  # fmt: skip
QWEN3_30B_A3B = _sizes(
    model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
