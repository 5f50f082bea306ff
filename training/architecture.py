"""The shape of `workbench-tiny`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from training.vocabulary import END

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 2048


def new_model(
    vocabulary: int, *, layers: int = 8, width: int = 256, heads: int = 8, kv_heads: int = 4, seed: int = 0
) -> PreTrainedModel:
    """An untrained float32 Llama with tied embeddings, heads of size `width // heads` and 2,048 positions.

    The defaults, with a vocabulary of 8,192, have 8.4 million parameters; every width is a multiple of 128, so that
    groups of 32, 64 and 128 fit into rows. The MLP is three times as wide as the model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
