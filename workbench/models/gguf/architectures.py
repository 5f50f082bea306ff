"""What a GGUF file's metadata means: a transformers config, for the architectures that are read exactly.

Every key under the architecture's own name is either taken into the config or refused, and so is every tensor: what is
dropped in silence makes another model. The meanings are llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.errors import CheckpointRefused
from workbench.models.gguf import configs
from workbench.models.gguf.header import Header
from workbench.models.gguf.settings import Settings, shortened

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DENSE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERTS = {"mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "mlp.experts.down_proj": ("ffn_down_exps",)}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is read.

    config: what becomes of its metadata. stems: GGUF's names inside a layer -> transformers'. interleaved: rows of
    queries and keys lie in pairs of rotary channels. norm_offset: what the file adds to the norms' weights.
    """

    config: Callable[[Settings], PretrainedConfig]
    stems: dict[str, str] = field(default_factory=lambda: _DENSE)
    interleaved: bool = False
    norm_offset: float = 0.0

    def sources(self, parameter: str) -> tuple[str, ...]:
        """The GGUF tensors that make up one parameter of the transformers model, joined along its rows."""
        stem, _, kind = parameter.rpartition(".")
        if stem in _OUTSIDE:
            return (f"{_OUTSIDE[stem]}.{kind}",)
        layer = _LAYER.fullmatch(parameter)
        if layer is None:
            return (parameter,)
        index, part, suffix = layer.groups()
        if part in _EXPERTS:
            return tuple(f"blk.{index}.{name}.weight" for name in _EXPERTS[part])
        names = {target: name for name, target in self.stems.items()}
        return (f"blk.{index}.{names.get(part, part)}{suffix or ''}",)


def config_of(header: Header) -> tuple[Architecture, PretrainedConfig]:
    """The architecture of a GGUF file and its config. Raises CheckpointRefused for what is not read exactly."""
    name = header.architecture
    if header.metadata.get("general.type", "model") != "model":
        raise CheckpointRefused(
            f"{header.path}: holds no whole model (general.type is {shortened(header.metadata['general.type'])})"
        )
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointRefused(
            f"{header.path}: is one of {shortened(parts)} parts of a model; join them with llama-gguf-split --merge"
        )
    if name not in _ARCHITECTURES:
        raise CheckpointRefused(
            f"{header.path}: the architecture {shortened(name)} is not read from GGUF ({', '.join(_ARCHITECTURES)} "
            "are); use a safetensors folder of the same model"
        )
    architecture, settings = _ARCHITECTURES[name], Settings(header)
    try:
        config = architecture.config(settings)
    except CheckpointRefused:
        raise
    except Exception as error:  # each config class has checks of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise CheckpointRefused(f"{header.path}: its metadata makes no valid config ({reason})") from error
    if settings.left:
        key = min(settings.left)
        raise settings.refusal(
            key.removeprefix(settings.prefix),
            f"(= {shortened(header.metadata[key])}) is not understood, and leaving it out could make another model",
        )
    return architecture, config


_ARCHITECTURES = {
    "llama": Architecture(configs.llama, interleaved=True),
    "qwen2": Architecture(configs.qwen2),
    "qwen2moe": Architecture(configs.qwen2_moe),
    "qwen3": Architecture(configs.qwen3),
    "qwen3moe": Architecture(configs.qwen3_moe),
    "gemma": Architecture(configs.gemma, norm_offset=1.0),
    "gemma2": Architecture(configs.gemma2, {**_DENSE, **_FOUR_NORMS}, norm_offset=1.0),
    "gemma3": Architecture(configs.gemma3, {**_DENSE, **_FOUR_NORMS}, norm_offset=1.0),
    "phi3": Architecture(configs.phi3, {**_DENSE, "ffn_up": "mlp.gate_up_proj"}),
}
