"""Small GGUF files for tests: transformers models written with the package `gguf`, as llama.cpp's converter would.

Names come from the package's own table and not from the workbench, so that both must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES: dict[str, gguf.MODEL_ARCH] = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
Tensors = dict[str, np.ndarray]


def metadata(model: torch.nn.Module) -> dict[str, Any]:
    """What a converter says of the model, by key without the architecture; None leaves a key out."""
    c = model.config
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    said: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": c.vocab_size,
        "attention.sliding_window": getattr(c, "sliding_window", None) or None,
        "attn_logit_softcapping": getattr(c, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(c, "final_logit_softcapping", None),
        "expert_count": getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None),
        "expert_used_count": getattr(c, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(c, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(c, "shared_expert_intermediate_size", None),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        said["rope.scaling.type"], said["rope.scaling.factor"] = rope["rope_type"], float(rope["factor"])
        said["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "longrope":
        said["rope.scaling.original_context_length"] = c.original_max_position_embeddings
        factor = c.max_position_embeddings / c.original_max_position_embeddings
        said["rope.scaling.attn_factor"] = float(
            np.sqrt(1 + np.log(factor) / np.log(c.original_max_position_embeddings))
        )
    return {key: value for key, value in said.items() if value is not None}


def tensors(model: torch.nn.Module) -> Tensors:
    """The model's weights under GGUF's names, changed as llama.cpp's converter changes them."""
    c = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[c.model_type], c.num_hidden_layers)
    found: Tensors = {}
    for parameter, weight in model.state_dict().items():
        if parameter == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if parameter.endswith("gate_up_proj") and "experts" in parameter:
            layer, half = parameter.split(".")[2], array.shape[1] // 2
            found[f"blk.{layer}.ffn_gate_exps.weight"] = array[:, :half]
            found[f"blk.{layer}.ffn_up_exps.weight"] = array[:, half:]
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if parameter.endswith("experts.down_proj"):
            name = f"blk.{parameter.split('.')[2]}.ffn_down_exps.weight"
        assert name is not None, parameter
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(parameter.split(".")[-2])
        if heads and ARCHITECTURES[c.model_type] == gguf.MODEL_ARCH.LLAMA:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if c.model_type.startswith("gemma") and parameter.endswith("norm.weight"):
            array = array + 1
        found[name] = array[0] if name.endswith("ffn_gate_inp_shexp.weight") else array
    rope = c.rope_parameters
    if rope.get("rope_type") == "longrope":
        found |= {f"rope_factors_{x}.weight": np.array(rope[f"{x}_factor"], np.float32) for x in ("long", "short")}
    return found


def write(
    path: Path,
    architecture: str,
    said: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    also: Mapping[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file. said: metadata under the architecture's name; also: under full keys."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**{f"{architecture}.{key}": value for key, value in said.items()}, **(also or {})}.items():
        _adder(writer, value)(key, value)
    for name, array in weights.items():
        quantised = kind if array.ndim > 1 and array.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, model: torch.nn.Module, also: Mapping[str, Any] | None = None) -> Path:
    """`model` as a GGUF file."""
    architecture = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]]
    return write(path, architecture, metadata(model), tensors(model), also)


def _adder(writer: gguf.GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    return kinds[type(value)]
