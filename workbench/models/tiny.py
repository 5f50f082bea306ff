"""Tiny random models of several architectures, for tests and examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import BadParameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# architecture -> (config class, model class, what differs from the common shape)
_ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mqa": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    "mha": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 2048}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
_NO_HEAD_DIM = ("qwen2", "phi3")  # real configs of these families carry none

TINY_ARCHITECTURES = tuple(_ARCHITECTURES)


def tiny(architecture: str = "llama", layers: int = 3, seed: int = 0, window: int = 16) -> PreTrainedModel:
    """A random float32 model: 256 tokens of vocabulary, width 64, 4 query and 2 KV heads of size 16, 2,048 positions.

    `architecture` is one of `TINY_ARCHITECTURES`; "mqa" and "mha" are Llama with 1 and 4 KV heads. "mistral" slides in
    every layer, "gemma3" and "gpt-oss" in every other one starting with the first, by `window` positions. The same
    `seed` gives the same weights, and the global random state is left alone. Weights are drawn wide, so that attention
    is far from uniform. No token ends a generation.

        >>> tiny("llama").config.num_key_value_heads
        2
    """
    if architecture not in _ARCHITECTURES:
        raise BadParameter(f"no tiny model {architecture!r}; there are {', '.join(TINY_ARCHITECTURES)}")
    import torch
    import transformers

    config_class, model_class, special = _ARCHITECTURES[architecture]
    options: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **special,
    }
    if architecture not in _NO_HEAD_DIM:
        options["head_dim"] = 16
    if architecture == "mistral":
        options["sliding_window"] = window
    if architecture in ("gemma3", "gpt-oss"):
        options["sliding_window"] = window
        options["layer_types"] = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    config = getattr(transformers, config_class)(**options, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_class)(config)
    model.eval()
    model.requires_grad_(False)
    return model
