"""What a GGUF file's metadata means: a transformers config, for the architectures that are read exactly.

Every key under the architecture's own name is either taken into the config or refused, and so is every tensor: what is
dropped in silence makes another model. The meanings are llama.cpp's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REQUIRED: Any = object()
_LARGEST = 1 << 27  # of any count in a header; real contexts end at ten million tokens
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
# Tensors that are part of the config: rotary factors.
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")


class Settings:
    """The metadata of one architecture by key, which remembers what was taken."""

    def __init__(self, header: Header) -> None:
        self.header, self.prefix = header, header.architecture + "."
        self.left = {key for key in header.metadata if key.startswith(self.prefix)}

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        name = self.prefix + key
        self.left.discard(name)
        found = self.header.metadata.get(name, default)
        if found is _REQUIRED:
            raise CheckpointRefused(f"{self.header.path}: the metadata lacks {name}; download it again")
        return found

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        found = self.take(key, default)
        if found is default and default is not _REQUIRED:
            return default  # type: ignore[no-any-return]
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= _LARGEST:
            raise self.refusal(key, f"is {_short(found)}, not one whole number")
        return found

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        found = self.take(key, default)
        if found is default and default is not _REQUIRED:
            return default  # type: ignore[no-any-return]
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise self.refusal(key, f"is {_short(found)}, not one finite number")
        return float(found)

    def refusal(self, key: str, why: str) -> CheckpointRefused:
        return CheckpointRefused(
            f"{self.header.path}: {self.prefix}{key} {why}; use another file or a safetensors folder of the same model"
        )


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
            f"{header.path}: holds no whole model (general.type is {_short(header.metadata['general.type'])})"
        )
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointRefused(
            f"{header.path}: is one of {_short(parts)} parts of a model; join them with llama-gguf-split --merge"
        )
    if name not in _ARCHITECTURES:
        raise CheckpointRefused(
            f"{header.path}: the architecture {_short(name)} is not read from GGUF ({', '.join(_ARCHITECTURES)} are); "
            "use a safetensors folder of the same model"
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
            f"(= {_short(header.metadata[key])}) is not understood, and leaving it out could make another model",
        )
    return architecture, config


def rotary_tensors(header: Header) -> set[str]:
    """The tensors of a file that its config has taken in."""
    return {name for name in _ROTARY if name in header.tensors}


# -- what most architectures share


def _shape(s: Settings) -> dict[str, Any]:
    """The sizes, the special tokens and the tie of input and output, as keywords of a config class."""
    header = s.header
    layers, hidden, heads = s.count("block_count"), s.count("embedding_length"), s.count("attention.head_count")
    if not 0 < layers <= len(header.tensors):
        raise s.refusal("block_count", f"is {layers:,}, in a file of {len(header.tensors):,} tensors")
    if heads < 1:
        raise s.refusal("attention.head_count", "is 0")
    head_dim = s.count("attention.key_length", hidden // heads)
    if s.count("attention.value_length", head_dim) != head_dim:
        raise s.refusal("attention.value_length", "differs from attention.key_length")
    if s.take("attention.causal", True) is not True or s.take("pooling_type", 0) != 0:
        raise s.refusal("attention.causal", "or a pooling_type says that this is no causal language model")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointRefused(f"{header.path}: lacks the tensor token_embd.weight; download it again")
    vocabulary = embedding.shape[0]
    if s.count("vocab_size", vocabulary) != vocabulary:
        raise s.refusal("vocab_size", f"differs from the {vocabulary:,} rows of token_embd.weight")
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": s.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": s.count("context_length"),
        "rms_norm_eps": s.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **special_ids(header, vocabulary),
    }


def special_ids(header: Header, vocabulary: int) -> dict[str, int | list[int] | None]:
    """The config's bos, eos and pad ids, as the file names them; every id that ends an answer is an eos."""

    def index(role: str) -> int | None:
        found = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if found is not None and (not isinstance(found, int) or not 0 <= found < vocabulary):
            raise CheckpointRefused(
                f"{header.path}: tokenizer.ggml.{role}_token_id is {_short(found)}, outside the vocabulary of "
                f"{vocabulary:,}"
            )
        return found

    ends = [end for end in dict.fromkeys(index(role) for role in ("eos", "eot", "eom")) if end is not None]
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": index("bos"), "eos_token_id": eos, "pad_token_id": index("padding")}


def _dense(s: Settings) -> dict[str, Any]:
    shape = _shape(s)
    shape["intermediate_size"] = s.count("feed_forward_length")
    shape["rope_parameters"] = _rope(s, shape["head_dim"])
    if s.count("expert_count", 0):
        raise s.refusal("expert_count", "is not 0 in an architecture without experts")
    s.count("expert_used_count", 0)
    return shape


def _experts(s: Settings) -> dict[str, Any]:
    shape = _shape(s)
    shape["rope_parameters"] = _rope(s, shape["head_dim"])
    shape["num_experts_per_tok"] = s.count("expert_used_count")
    count, gates = s.count("expert_count"), s.header.tensors.get("blk.0.ffn_gate_exps.weight")
    if gates is None or len(gates.shape) != 3 or gates.shape[0] != count:
        raise s.refusal("expert_count", f"is {count:,}, and blk.0.ffn_gate_exps.weight does not hold as many")
    if not 0 < shape["num_experts_per_tok"] <= count:
        raise s.refusal("expert_used_count", f"is {shape['num_experts_per_tok']:,} of {count:,} experts")
    shape["experts"] = count
    width = s.count("feed_forward_length", gates.shape[1])
    shape["expert_size"] = s.count("expert_feed_forward_length", gates.shape[1])
    return {**shape, "intermediate_size": width}


def _rope(s: Settings, head_dim: int, *, own_factors: bool = False) -> dict[str, Any]:
    """The rotary parameters: base, scaling, and Llama 3's factors. own_factors: the caller sees to rope_factors_*."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": s.number("rope.freq_base", 10000.0)}
    turned = s.count("rope.dimension_count", head_dim)
    if turned != head_dim and not own_factors:
        raise s.refusal("rope.dimension_count", f"is {turned}, and heads of {head_dim} channels turn as a whole")
    kind, factor = s.take("rope.scaling.type", None), s.number("rope.scaling.factor", 1.0)
    s.take("rope.scaling.finetuned", None)  # says how the model was made, not what it computes
    original = s.count("rope.scaling.original_context_length", None)
    stretch = s.number("rope.scaling.attn_factor", 1.0)
    if (legacy := s.number("rope.scale_linear", 1.0)) != 1.0:
        kind, factor = "linear", legacy
    if own_factors:
        return {**found, "kind": kind, "original": original, "stretch": stretch, "turned": turned}
    if kind == "linear" and factor > 0:
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor > 0 and original:
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := s.number(f"rope.scaling.{theirs}", None)) is not None:
                found[ours] = value
        if stretch != 1.0:
            found["attention_factor"] = stretch * (0.1 * math.log(factor) + 1.0)
            stretch = 1.0
    elif kind not in (None, "none"):
        raise s.refusal("rope.scaling.type", f"is {_short(kind)}, and only none, linear and yarn are read here")
    if stretch != 1.0:
        raise s.refusal("rope.scaling.attn_factor", f"is {stretch}, which belongs to no scaling that is read here")
    if "rope_freqs.weight" in s.header.tensors:
        if found["rope_type"] != "default":
            raise s.refusal("rope.scaling.type", "stands beside rope_freqs.weight, and one of them would be lost")
        found |= _llama3(s, found["rope_theta"], head_dim)
    return found


def _llama3(s: Settings, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling whose factors rope_freqs.weight [d / 2] holds: each frequency is divided by its own.

    The file has the factors and not what they were made from, so those of the Llama 3 family are tried.
    """
    import torch

    from workbench.models.gguf.weights import tensor

    factors = tensor(s.header, "rope_freqs.weight").double()
    if factors.shape != (head_dim // 2,):
        raise CheckpointRefused(
            f"{s.header.path}: rope_freqs.weight has {factors.numel()} factors for {head_dim} channels"
        )
    if torch.equal(factors, torch.ones_like(factors)):
        return {}
    low, high, original, factor = 1.0, 4.0, 8192, round(factors.max().item(), 3)
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
        raise CheckpointRefused(
            f"{s.header.path}: the factors in rope_freqs.weight are not those of Llama 3's scaling; use a safetensors "
            "folder of the same model"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# -- the architectures


def _llama(s: Settings) -> PretrainedConfig:
    """Llama and all that llama.cpp writes as such: Mistral with its window, Mixtral with its experts."""
    from transformers import LlamaConfig, MistralConfig, MixtralConfig

    window = s.count("attention.sliding_window", 0) or None
    if s.header.metadata.get("llama.expert_count", 0):
        found = _experts(s)
        size = found.pop("expert_size")
        return MixtralConfig(
            **{**found, "intermediate_size": size}, num_local_experts=found.pop("experts"), sliding_window=window
        )
    dense = _dense(s)
    if window is not None:
        return MistralConfig(**dense, sliding_window=window)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    dense |= {name: tensor in s.header.tensors for name, tensor in biases.items()}
    return LlamaConfig(**dense)


def _qwen2(s: Settings) -> PretrainedConfig:
    from transformers import Qwen2Config

    dense = _dense(s)
    if dense["head_dim"] * dense["num_attention_heads"] != dense["hidden_size"]:
        raise s.refusal("attention.key_length", "is not the width divided by the heads, which it is in Qwen 2")
    return Qwen2Config(**dense)


def _qwen2_moe(s: Settings) -> PretrainedConfig:
    from transformers import Qwen2MoeConfig

    found = _experts(s)
    shared = s.header.tensors.get("blk.0.ffn_gate_shexp.weight")
    return Qwen2MoeConfig(
        num_experts=found.pop("experts"),
        moe_intermediate_size=found.pop("expert_size"),
        shared_expert_intermediate_size=s.count("expert_shared_feed_forward_length", shared.shape[0] if shared else 0),
        norm_topk_prob=False,
        **found,
    )


def _qwen3(s: Settings) -> PretrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(**_dense(s))


def _qwen3_moe(s: Settings) -> PretrainedConfig:
    from transformers import Qwen3MoeConfig

    found = _experts(s)
    return Qwen3MoeConfig(
        num_experts=found.pop("experts"), moe_intermediate_size=found.pop("expert_size"), norm_topk_prob=True, **found
    )


def _gemma(s: Settings) -> PretrainedConfig:
    from transformers import GemmaConfig

    return GemmaConfig(**_dense(s))


def _gemma2(s: Settings) -> PretrainedConfig:
    from transformers import Gemma2Config

    dense = _dense(s)
    return Gemma2Config(
        **dense,
        query_pre_attn_scalar=_query_scale(s, dense, largest=46),
        attn_logit_softcapping=s.number("attn_logit_softcapping", 50.0) or None,
        final_logit_softcapping=s.number("final_logit_softcapping", 30.0) or None,
        sliding_window=s.count("attention.sliding_window", 4096),
        layer_types=_sliding(s, dense["num_hidden_layers"], period=2),
    )


def _gemma3(s: Settings) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    dense = _dense(s)
    local = {"rope_type": "default", "rope_theta": s.number("rope.freq_base_swa", 10000.0)}
    return Gemma3TextConfig(
        **{**dense, "rope_parameters": {"full_attention": dense["rope_parameters"], "sliding_attention": local}},
        query_pre_attn_scalar=_query_scale(s, dense, largest=62),
        final_logit_softcapping=s.number("final_logit_softcapping", 0.0) or None,
        sliding_window=s.count("attention.sliding_window"),
        layer_types=_sliding(s, dense["num_hidden_layers"], period=6),
    )


def _query_scale(s: Settings, shape: dict[str, Any], largest: int) -> Any:
    """What queries are divided by the root of. No file says it: the largest model of a family has its own."""
    if (scale := s.number("attention.scale", None)) is not None and scale > 0:
        return scale**-2
    if shape["num_hidden_layers"] == largest:
        return shape["hidden_size"] // shape["num_attention_heads"]
    return shape["head_dim"]


def _sliding(s: Settings, layers: int, period: int) -> list[str]:
    """Which layers slide: all but every `period`th, unless the file names a period or each layer."""
    pattern = s.take("attention.sliding_window_pattern", period)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and 0 < pattern <= layers + period:
        pattern = [(index + 1) % pattern != 0 for index in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise s.refusal("attention.sliding_window_pattern", f"is {_short(pattern)}, for {layers} layers")
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _phi3(s: Settings) -> PretrainedConfig:
    from transformers import Phi3Config

    from workbench.models.gguf.weights import tensor

    shape = _shape(s)
    head_dim = shape.pop("head_dim")
    if head_dim * shape["num_attention_heads"] != shape["hidden_size"]:
        raise s.refusal("attention.key_length", "is not the width divided by the heads, which it is in Phi 3")
    shape["intermediate_size"] = s.count("feed_forward_length")
    rope = _rope(s, head_dim, own_factors=True)
    kind, original, stretch, turned = (rope.pop(name) for name in ("kind", "original", "stretch", "turned"))
    rope["partial_rotary_factor"] = turned / head_dim
    names = {f"{length}_factor": f"rope_factors_{length}.weight" for length in ("long", "short")}
    held = [name for name in names.values() if name in s.header.tensors]
    if kind not in (None, "none", "longrope") or "rope_freqs.weight" in s.header.tensors or len(held) == 1:
        raise s.refusal("rope.scaling.type", f"is {_short(kind)}, with {held or 'no'} factors, which is not read here")
    original = shape["max_position_embeddings"] if original is None else original
    if held:
        rope["rope_type"] = "longrope"
        rope |= {name: tensor(s.header, source).tolist() for name, source in names.items()}
        rope |= {"attention_factor": stretch, "original_max_position_embeddings": original}
    elif stretch != 1.0:
        raise s.refusal("rope.scaling.attn_factor", f"is {stretch}, without rope_factors_long.weight")
    return Phi3Config(
        **shape,
        rope_parameters=rope,
        original_max_position_embeddings=original,
        sliding_window=s.count("attention.sliding_window", 0) or None,
    )


_ARCHITECTURES = {
    "llama": Architecture(_llama, interleaved=True),
    "qwen2": Architecture(_qwen2),
    "qwen2moe": Architecture(_qwen2_moe),
    "qwen3": Architecture(_qwen3),
    "qwen3moe": Architecture(_qwen3_moe),
    "gemma": Architecture(_gemma, norm_offset=1.0),
    "gemma2": Architecture(_gemma2, {**_DENSE, **_FOUR_NORMS}, norm_offset=1.0),
    "gemma3": Architecture(_gemma3, {**_DENSE, **_FOUR_NORMS}, norm_offset=1.0),
    "phi3": Architecture(_phi3, {**_DENSE, "ffn_up": "mlp.gate_up_proj"}),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
