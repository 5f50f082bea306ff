"""Tiny random models that see images, with processors built by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.byte_tokens import byte_tokenizer

IMAGE, VIDEO, START, END = 290, 291, 292, 293
_TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_ROTATED = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 14}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
# Of each kind: its config, and the part of its vision config that no other has.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Llava": {
        "vision_config": tf.CLIPVisionConfig(**_VISION),
        "text_config": tf.LlamaConfig(**_TEXT),
        "image_token_id": IMAGE,
        "vision_feature_layer": -1,
    },
    "Qwen2VL": {
        "text_config": _ROTATED,
        "vision_config": _QWEN | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1},
        **_QWEN_IDS,
    },
    "Qwen2_5_VL": {
        "text_config": _ROTATED,
        "vision_config": _QWEN
        | {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 32,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        **_QWEN_IDS,
    },
    "Qwen3VL": {
        "text_config": _ROTATED,
        "vision_config": _QWEN
        | {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **_QWEN_IDS,
    },
    "Gemma3": {
        "text_config": _TEXT | {"sliding_window": 16},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "image_token_id": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "Idefics3": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION,
        "scale_factor": 2,
        "image_token_id": IMAGE,
        "pad_token_id": 0,
    },
}
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}{% if c['type'] == 'image' %}MARK"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def pictures(count: int = 2) -> list[np.ndarray]:
    """Noise, each of another shape."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (56 + 28 * i, 84 - 28 * i, 3), dtype=np.uint8) for i in range(count)]


def seeing_model(kind: str) -> PreTrainedModel:
    """A model of three layers, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: Any = getattr(tf, f"{kind}ForConditionalGeneration")(getattr(tf, f"{kind}Config")(**_CONFIGS[kind]))
    return built.eval().requires_grad_(False)  # type: ignore[no-any-return]


def processor(kind: str) -> Any:
    """What prepares its texts and images: a token a byte, images of a few patches."""
    images: Any = {
        "Llava": lambda: _pil("llava", "Llava", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        "Gemma3": lambda: _pil("gemma3", "Gemma3", size={"height": 28, "width": 28}),
        "Idefics3": lambda: _pil(
            "idefics3", "Idefics3", size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
        ),
    }.get(kind, lambda: _pil("qwen2_vl", "Qwen2VL", size={"shortest_edge": 784, "longest_edge": 84 * 84}))()
    if kind == "Llava":
        tokens = _tokenizer("<image>")
        options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return tf.LlavaProcessor(images, tokens, chat_template=_TEMPLATE.replace("MARK", "<image>"), **options)
    if kind == "Gemma3":
        names = {"image_token": "<soft>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        tokens = _tokenizer("<soft>", "<video>", "<start_of_image>", "<end_of_image>", extra_special_tokens=names)
        template = _TEMPLATE.replace("MARK", "<start_of_image>")
        return tf.Gemma3Processor(images, tokens, image_seq_length=4, chat_template=template)
    if kind == "Idefics3":
        tokens = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
        return tf.Idefics3Processor(images, tokens, image_seq_len=1, chat_template=_TEMPLATE.replace("MARK", "<image>"))
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    template = _TEMPLATE.replace("MARK", f"{marks[2]}{marks[0]}{marks[3]}")
    return _without_videos(getattr(tf, f"{kind}Processor"))(images, _tokenizer(*marks), None, chat_template=template)


def seeing(kind: str) -> tuple[PreTrainedModel, Any]:
    """Both, as a session takes them."""
    return seeing_model(kind), processor(kind)


def _without_videos(kind: type) -> type:
    """A processor that may lack the part for videos, which needs torchvision."""

    def given(_self: Any, _name: str, part: Any) -> type:
        return type(part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": given})


def _pil(module: str, name: str, **options: Any) -> Any:
    """The image processor that needs Pillow alone."""
    return getattr(getattr(tf.models, module), f"image_processing_pil_{module}").__dict__[f"{name}ImageProcessorPil"](
        **options
    )


def _tokenizer(*special: str, **options: Any) -> PreTrainedTokenizerFast:
    """A token a byte, and special ones from IMAGE on."""
    bytewise = byte_tokenizer()
    unused = [f"<unused{number}>" for number in range(len(bytewise), IMAGE)]
    bytewise.add_tokens([AddedToken(token, special=True) for token in (*unused, *special)])
    return PreTrainedTokenizerFast(tokenizer_object=bytewise.backend_tokenizer, **options)
