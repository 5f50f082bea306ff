"""What becomes of every kind of causal language model that the installed transformers knows: exact, or refused.

Each kind is built as a tiny random model. What the workbench reads and decodes with it is compared with transformers'
own `generate`, and on those that are exact a few methods and looks are tried. `python -m benchmarks.model_kinds` writes
the figures, of which docs/model_kinds.py makes a page with a row for each kind; tests/models/test_kinds.py holds them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import workbench as wb
from benchmarks.record import environment, write
from workbench.errors import WorkbenchError
from workbench.models.findings import ranges
from workbench.models.quiet import quiet

MOST_BYTES = 5_000_000  # of weights in float32: larger ones are not built
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
# Sizes under the names that some configs give them; set where a config has the name.
_NAMED: dict[str, Any] = {
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "use_sliding_window": True,
    "n_positions": 512,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "zero_expert_num": 1,
    "expert_ffn_hidden_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 128,
    "intermediate_size_mlp": 128,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,  # its scores are sums of ReLUs: with few heads they tie, and ties fall as tokens are read
    "index_head_dim": 16,
    "index_topk": 8,
    "ffn_hidden_size": 128,
    "ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "dim_ff": 128,
    "dff": 128,
    "dim_head": 16,
    "d_model": 64,
    "n_embd": 64,
    "n_layer": 4,
    "n_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_layers": 4,
    "embedding_size": 64,
    "decoder_layers": 4,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "rotary_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "router_hidden_size": 32,
    "laurel_rank": 8,
    "adapter_rank": 8,
}
_LEFT = object()  # the config's own value stays
_PADDED = {"pad_token_id": 1}  # positions begin after the padding's index
_IDS = {"bos_token_id": 0, "eos_token_id": 255, "pad_token_id": 1}
_TEXT = {
    name: size for name, size in (COMMON | _NAMED).items() if name not in ("n_layer", "n_head", "n_embd", "d_model")
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA4 = {"text_config": _TEXT | {"pad_token_id": 0, "per_layer_config": {"3": {"head_dim": 32}}}}
_ONE_STREAM = {"num_codebooks": 1, **_PADDED}
_BYTES = ("patcher", "encoder", "decoder", "global")  # the models that BLT is made of
_ALTERNATING = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
# What one kind needs besides, so that the model of transformers itself can be built and run.
_KINDS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), _PADDED),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _PADDED),
    **dict.fromkeys(("cwm", "modernbert-decoder"), _IDS),
    "gemma3": {"text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "bailing_hybrid": {"layer_types": _ALTERNATING},
    "kimi_linear": {"layer_types": _ALTERNATING},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        **{f"{part}_config": _TEXT | {"hidden_size_global": 64, "num_key_value_heads": 4} for part in _BYTES},
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 500,
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v4": {"num_hidden_layers": 2},
    "dots3_note_text": {"per_layer_config": _LEFT, "num_hidden_layers": 2},
    "falcon": {"head_dim": _LEFT},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": [f"{span}_attention" for span in ("sliding", "sliding", "full", "sliding", "full")],
        "activation_sparsity_pattern": [0.0] * 5,
    },
    **dict.fromkeys(("gemma4", "gemma4_unified"), _GEMMA4),
    **dict.fromkeys(("emu3", "mllama"), _IDS),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _ONE_STREAM),
    "moss_transcribe_diarize": {
        "text_config": {"model_type": "qwen3", **_TEXT},
        "audio_config": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32},
    },
    "phi4_multimodal": {
        "vision_config": _VISION | {"crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "got_ocr2": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": _VISION | {"mlp_dim": 32, "output_channels": 16},
    },
    "gemma4_text": {"head_dim": _LEFT, "per_layer_config": {"3": {"head_dim": 32}}},
    "gemma4_unified_text": {"head_dim": _LEFT, "per_layer_config": {"3": {"head_dim": 32}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 16},
    "granite_swa": {"layer_types": _SLIDING},
    "granitemoe_swa": {"layer_types": _SLIDING},
    "mimo_v2_flash": {"layer_types": _SLIDING},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "git": {"vision_config": _VISION},
    "llama4_text": {"attention_chunk_size": 16, "floor_scale": 8},
    "longcat_flash": {"num_layers": 2, "head_dim": 8},
    "minimax": {"sliding_window": _LEFT},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron_h": {"num_hidden_layers": _LEFT, "n_groups": 2},
    "prophetnet": {"num_hidden_layers": _LEFT, "num_decoder_layers": 2, "num_encoder_layers": 2, **_PADDED},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32]},
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 16,
        "shape_embed_dim": 16,
        "shape_vocab_size": 16,
    },
    "xlnet": {"n_layer": 4, "num_hidden_layers": _LEFT, "d_inner": 128, "d_head": 16},
    "xlstm": {"v_head_dim": _LEFT, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {**_PADDED, "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "head_dim": _LEFT},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "head_dim": _LEFT},
    "zaya": {"num_experts_per_tok": 1},
}


class Unbuildable(Exception):
    """The kind cannot be made tiny by these rules."""


def kinds() -> dict[str, type]:
    """Each kind's config class under its model type."""
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def same_as(kind: str) -> str | None:
    """The other kind whose model this kind's is: that of the config of its text; None where it has its own."""
    made = kinds()[kind]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[made]
    others = (name for name, other in kinds().items() if other is model_class.config_class and other is not made)
    return next(others, None)


def config_of(kind: str) -> Any:
    """A tiny config of a kind; where its model takes that of its decoder alone, as MusicGen's does, one of that."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kinds()[kind]]
    made = model_class.config_class
    try:
        names = set(made().to_dict()) | set(getattr(made, "attribute_map", {}))
    except Exception:  # noqa: BLE001  configs without defaults, or that import what is not installed
        names = set()
    options = COMMON | {name: size for name, size in _NAMED.items() if name in names and name not in COMMON}
    if "qk_rope_head_dim" in names:  # multi-head latent attention: as many KV heads as query heads
        options["num_key_value_heads"] = options["num_attention_heads"]
        options.pop("head_dim", None)
    options |= _KINDS.get(kind, {})
    return made(**{name: size for name, size in options.items() if size is not _LEFT})


def tiny_of(kind: str) -> PreTrainedModel:
    """A tiny random float32 model of a kind, the same each time. Raises Unbuildable."""
    try:
        config, model_class = config_of(kind), cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING[kinds()[kind]])
        with torch.device("meta"):
            size = 4 * sum(weight.numel() for weight in model_class(config).parameters())
    except Exception as error:  # every kind has its own way to fail
        raise Unbuildable(_line(error)) from error
    if size > MOST_BYTES:
        raise Unbuildable(f"{size / 1e6:.0f} MB of weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config)
    model.eval().requires_grad_(False)
    return model


TOKENS, NEW = 40, 8  # read, and generated
QUESTION = 5  # tokens read at once after the prompt
_MOST = 400  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """What became of a kind.

    exact: reading, decoding one by one and several tokens at once equal transformers' own. refused: in one line (why).
    broken: transformers cannot run its own model (why). unbuilt: it cannot be made tiny (why). wrong: something else,
    which is a defect here (why). looks: on an exact one, what each method or look said: "works", or why not. left: on
    an exact one, the layers that KV methods leave as they are, as "0-2, 4", by reason. same_as: the kind whose model
    this one's is, and which was tried in its place.
    """

    kind: str
    result: Literal["exact", "refused", "broken", "unbuilt", "wrong"]
    why: str = ""
    looks: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    same_as: str | None = None


LOOKS: dict[str, Callable[[wb.Session], Any]] = {
    "snapkv 0.5": lambda s: s.run("snapkv", budget=0.5, max_new_tokens=3),
    "kivi 4 bit": lambda s: s.run("kivi", bits=4, max_new_tokens=3),
    "census rtn": lambda s: s.census("rtn", outputs=False),
    "outliers": lambda s: (s.outliers("keys"), s.outliers("activations"), s.outliers("weights")),
    "spectra": lambda s: s.spectra(layer=0),
}


def outcome(kind: str) -> Outcome:
    """What becomes of one kind; nothing is raised."""
    other = same_as(kind)
    if other is not None:
        return replace(outcome(other), kind=kind, same_as=other)
    try:
        model = tiny_of(kind)
    except Unbuildable as error:
        return Outcome(kind, "unbuilt", str(error))
    ids = torch.randint(3, 250, (TOKENS + QUESTION,), generator=torch.Generator().manual_seed(0))
    try:
        want = (_generated(model, ids[:TOKENS]), _generated(model, ids))
    except Exception as error:  # noqa: BLE001  transformers' own model
        return Outcome(kind, "broken", _line(error))
    try:
        session = wb.Session((model, None), kv_dtype="float32")
        session.read(ids[:TOKENS])
        got = (_answered(session), _answered(session, ids[TOKENS:]))
    except WorkbenchError as error:
        return Outcome(kind, "refused" if _one_line(error) else "wrong", str(error))
    except Exception as error:  # noqa: BLE001  a defect here, which is what is looked for
        return Outcome(kind, "wrong", _line(error))
    if got != want:
        return Outcome(kind, "wrong", f"{got} where transformers has {want}")
    looks = {name: _looked(session, look) for name, look in LOOKS.items()}
    return Outcome(kind, "exact", looks=looks, left=_left(session))


def _left(session: wb.Session) -> dict[str, str]:
    assert session.trace is not None
    layers: dict[str, list[int]] = {}
    for layer, why in session.trace.exact.items():
        layers.setdefault(why, []).append(layer)
    return {why: ranges(numbers) for why, numbers in layers.items()}


def _generated(model: PreTrainedModel, ids: Tensor) -> list[int]:
    """What transformers itself generates after ids [n]."""
    settings = model.generation_config
    for name in (
        "eos_token_id",
        "forced_eos_token_id",
        "forced_bos_token_id",
        "begin_suppress_tokens",
        "suppress_tokens",
    ):
        setattr(settings, name, None)
    with torch.inference_mode(), quiet():
        made: Any = model.generate(ids[None], max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    return list(made[0, ids.numel() :].tolist())


def _answered(session: wb.Session, question: Tensor | None = None) -> list[int]:
    return list(session.run("full", question=question, max_new_tokens=NEW).tokens)


def _looked(session: wb.Session, look: Callable[[wb.Session], Any]) -> str:
    try:
        look(session)
    except WorkbenchError as error:
        return str(error) if _one_line(error) else f"wrong: {error}"
    except Exception as error:  # noqa: BLE001  a defect here, which is what is looked for
        return f"wrong: {_line(error)}"
    return "works"


def _one_line(error: Exception) -> bool:
    return 0 < len(str(error)) <= _MOST and "\n" not in str(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def main() -> None:
    torch.set_num_threads(1)
    before = environment()
    found = _outcomes()
    counts = Counter(one.result for one in found)
    said = Counter((name, said) for one in found for name, said in one.looks.items())
    summary = [["outcome", "kinds"], *([name, str(count)] for name, count in counts.most_common())]
    looks = [["on exact kinds", "works", "refused, with the reason"]]
    for name in LOOKS:
        works = said[name, "works"]
        looks.append([name, str(works), str(counts["exact"] - works)])
    rows = [{"config": kinds()[one.kind].__name__, **asdict(one)} for one in found]
    figures = {"counts": dict(counts), "kinds": rows}
    write("model_kinds", json.loads(json.dumps(figures)), summary, before, looks)


def _outcomes() -> list[Outcome]:
    """What becomes of every kind, by name; a model of several kinds is tried once."""
    found = {kind: outcome(kind) for kind in kinds() if same_as(kind) is None}
    for kind in kinds().keys() - found.keys():
        other = same_as(kind)
        assert other is not None
        found[kind] = replace(found[other], kind=kind, same_as=other)
    return [found[kind] for kind in sorted(found)]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
