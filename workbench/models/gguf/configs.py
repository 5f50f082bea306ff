"""The transformers config of each architecture that is read from GGUF; the meanings are llama.cpp's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.errors import CheckpointRefused
from workbench.models.gguf.header import Header
from workbench.models.gguf.rope import rope
from workbench.models.gguf.settings import Settings, shortened
from workbench.models.gguf.tensors import tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        number = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None and (not isinstance(number, int) or not 0 <= number < vocabulary):
            raise CheckpointRefused(
                f"{header.path}: tokenizer.ggml.{role}_token_id is {shortened(number)}, outside the vocabulary of "
                f"{vocabulary:,}"
            )
        return number

    ends = [end for end in dict.fromkeys(index(role) for role in ("eos", "eot", "eom")) if end is not None]
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": index("bos"), "eos_token_id": eos, "pad_token_id": index("padding")}


def _dense(s: Settings) -> dict[str, Any]:
    shape = _shape(s)
    shape["intermediate_size"] = s.count("feed_forward_length")
    shape["rope_parameters"] = rope(s, shape["head_dim"])
    if s.count("expert_count", 0):
        raise s.refusal("expert_count", "is not 0 in an architecture without experts")
    s.count("expert_used_count", 0)
    return shape


def _experts(s: Settings) -> dict[str, Any]:
    shape = _shape(s)
    shape["rope_parameters"] = rope(s, shape["head_dim"])
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


def llama(s: Settings) -> PretrainedConfig:
    """Llama and all that llama.cpp writes as such: Mistral with its window, Mixtral with its experts."""
    from transformers import LlamaConfig, MistralConfig, MixtralConfig

    window = s.count("attention.sliding_window", 0) or None
    if s.header.metadata.get("llama.expert_count", 0):
        sizes = _experts(s)
        size = sizes.pop("expert_size")
        return MixtralConfig(
            **{**sizes, "intermediate_size": size}, num_local_experts=sizes.pop("experts"), sliding_window=window
        )
    dense = _dense(s)
    if window is not None:
        return MistralConfig(**dense, sliding_window=window)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    dense |= {name: tensor in s.header.tensors for name, tensor in biases.items()}
    return LlamaConfig(**dense)


def qwen2(s: Settings) -> PretrainedConfig:
    """Qwen 2, whose heads share the width out."""
    from transformers import Qwen2Config

    dense = _dense(s)
    if dense["head_dim"] * dense["num_attention_heads"] != dense["hidden_size"]:
        raise s.refusal("attention.key_length", "is not the width divided by the heads, which it is in Qwen 2")
    return Qwen2Config(**dense)


def qwen2_moe(s: Settings) -> PretrainedConfig:
    """Qwen 2 with experts, one of which always answers."""
    from transformers import Qwen2MoeConfig

    sizes = _experts(s)
    shared = s.header.tensors.get("blk.0.ffn_gate_shexp.weight")
    return Qwen2MoeConfig(
        num_experts=sizes.pop("experts"),
        moe_intermediate_size=sizes.pop("expert_size"),
        shared_expert_intermediate_size=s.count("expert_shared_feed_forward_length", shared.shape[0] if shared else 0),
        norm_topk_prob=False,
        **sizes,
    )


def qwen3(s: Settings) -> PretrainedConfig:
    """Qwen 3."""
    from transformers import Qwen3Config

    return Qwen3Config(**_dense(s))


def qwen3_moe(s: Settings) -> PretrainedConfig:
    """Qwen 3 with experts."""
    from transformers import Qwen3MoeConfig

    sizes = _experts(s)
    return Qwen3MoeConfig(
        num_experts=sizes.pop("experts"), moe_intermediate_size=sizes.pop("expert_size"), norm_topk_prob=True, **sizes
    )


def gemma(s: Settings) -> PretrainedConfig:
    """The first Gemma."""
    from transformers import GemmaConfig

    return GemmaConfig(**_dense(s))


def gemma2(s: Settings) -> PretrainedConfig:
    """Gemma 2: soft caps, and every other layer slides."""
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


def gemma3(s: Settings) -> PretrainedConfig:
    """Gemma 3: five layers of six slide, with a rotary base of their own."""
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
        raise s.refusal("attention.sliding_window_pattern", f"is {shortened(pattern)}, for {layers} layers")
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def phi3(s: Settings) -> PretrainedConfig:
    """Phi 3, whose long variants carry rotary factors."""
    from transformers import Phi3Config

    shape = _shape(s)
    head_dim = shape.pop("head_dim")
    if head_dim * shape["num_attention_heads"] != shape["hidden_size"]:
        raise s.refusal("attention.key_length", "is not the width divided by the heads, which it is in Phi 3")
    shape["intermediate_size"] = s.count("feed_forward_length")
    rotary = rope(s, head_dim, own_factors=True)
    kind, original, stretch, rotated = (rotary.pop(name) for name in ("kind", "original", "stretch", "rotated"))
    rotary["partial_rotary_factor"] = rotated / head_dim
    names = {f"{length}_factor": f"rope_factors_{length}.weight" for length in ("long", "short")}
    factors = [name for name in names.values() if name in s.header.tensors]
    if kind not in (None, "none", "longrope") or "rope_freqs.weight" in s.header.tensors or len(factors) == 1:
        raise s.refusal(
            "rope.scaling.type", f"is {shortened(kind)}, with {factors or 'no'} factors, which is not read here"
        )
    original = shape["max_position_embeddings"] if original is None else original
    if factors:
        rotary["rope_type"] = "longrope"
        rotary |= {name: tensor(s.header, source).tolist() for name, source in names.items()}
        rotary |= {"attention_factor": stretch, "original_max_position_embeddings": original}
    elif stretch != 1.0:
        raise s.refusal("rope.scaling.attn_factor", f"is {stretch}, without rope_factors_long.weight")
    return Phi3Config(
        **shape,
        rope_parameters=rotary,
        original_max_position_embeddings=original,
        sliding_window=s.count("attention.sliding_window", 0) or None,
    )
