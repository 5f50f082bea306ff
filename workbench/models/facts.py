"""The few facts the workbench needs of a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import NotApplicable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


UNLIMITED = sys.maxsize


@dataclass(frozen=True)
class Facts:
    """What is fixed about a model once it is loaded. Sizes are in elements unless they say bytes."""

    name: str  # as the user knows it
    model_type: str  # transformers' own word: "llama", "qwen3", ...
    layers: int
    heads: int  # query heads h
    kv_heads: int  # KV heads k
    head_dim: int  # d
    hidden_size: int
    vocab_size: int
    max_positions: int
    parameters: int  # tied weights counted once
    weight_bytes: int  # as they lie in memory now
    weight_bytes_16bit: int  # the same parameters at two bytes each
    checkpoint_dtype: torch.dtype | None  # what the checkpoint was stored in, where it says so
    # Per layer: "full_attention", "sliding_attention", or another word of transformers, which for layers that keep a
    # state instead of keys and values, or beside them, is "linear_attention", "conv", "hybrid"; all count as layers.
    layer_types: tuple[str, ...]
    windows: tuple[int | None, ...]  # per layer: how many positions a query sees, itself included; None for all
    eos_ids: tuple[int, ...]  # token ids that end a generation
    chunks: tuple[int | None, ...] = ()  # per layer: how many positions make a chunk that sees itself alone; None: all

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


def facts(model: PreTrainedModel, name: str | None = None, checkpoint_dtype: torch.dtype | None = None) -> Facts:
    """Read the facts off a loaded transformers model.

    `name` defaults to what the config carries, else the model type; `checkpoint_dtype` to the config's dtype. Raises
    `NotApplicable` for a model that is no decoder with a language head, or has no attention heads in its config.
    """
    kind = type(model).__name__
    if not model.can_generate():
        raise NotApplicable(
            f"{kind} does not generate text; give the model with its language head, as AutoModelForCausalLM loads it"
        )
    if model.config.is_encoder_decoder:
        raise NotApplicable(f"{kind} is an encoder and a decoder; the workbench reads decoders alone")
    config: Any = model.config.get_text_config()
    heads = _said(config, "num_attention_heads")
    if heads is None:
        raise NotApplicable(f"{kind} has no attention heads in its config; the workbench reads decoders with attention")
    layer_types, windows = _attention_span(config)
    parameters = list(model.parameters())  # tied ones come once
    count = sum(weight.numel() for weight in parameters)
    return Facts(
        name=name or getattr(model.config, "_name_or_path", "") or config.model_type,
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=_said(config, "num_key_value_heads") or heads,
        head_dim=_head_dim(config, heads),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_positions(model),
        parameters=count,
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in parameters),
        weight_bytes_16bit=2 * count,
        checkpoint_dtype=checkpoint_dtype or getattr(config, "dtype", None),
        layer_types=layer_types,
        windows=windows,
        eos_ids=_eos_ids(model),
        chunks=chunks(model),
    )


def _said(config: Any, name: str) -> int | None:
    """A positive number that a config gives under a name; that of its first layer where layers differ."""
    by_layer = getattr(config, "per_layer_config", None)
    found = getattr(by_layer[0] if by_layer else config, name, None)
    return found if isinstance(found, int) and found > 0 else None


def _head_dim(config: Any, heads: int) -> int:
    """The size of a key, as the config has it; once a prompt has been read, what was recorded counts."""
    for name in ("qk_head_dim", "head_dim"):  # DeepSeek's head_dim is that of its rotated part alone
        if found := _said(config, name):
            return found
    return int(config.hidden_size // heads)


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens a model can read; `UNLIMITED` where nothing in its config limits them (ALiBi, a state space).

    A table of positions that begins behind its padding (RoBERTa) has fewer than the config says.
    """
    from torch import nn

    config: Any = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
    limit = next((size for name in names if (size := _said(config, name))), UNLIMITED)
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


def chunks(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Of each layer how many positions make a chunk, of which a query sees only its own; None: there are no chunks."""
    config: Any = model.config.get_text_config(decoder=True)
    chunk = _said(config, "attention_chunk_size")
    return tuple(chunk if kind == "chunked_attention" else None for kind in getattr(config, "layer_types", None) or ())


def _attention_span(config: Any) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Each layer's type and window, as transformers' own cache decides them.

    Configs are no reliable witness: Mistral slides in every layer without saying `layer_types`, Qwen2 names a window
    that `use_sliding_window` switches off. The cache and the masks agree, so the cache is asked.
    """
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers  # nothing is allocated before the first update
    count = config.num_hidden_layers
    named = getattr(config, "layer_types", None)
    windows: list[int | None] = []
    types: list[str] = []
    for index in range(count):
        layer: Any = layers[index] if index < len(layers) else None  # layers that reuse another's KV have none
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        chunked = named is not None and index < len(named) and named[index] == "chunked_attention"
        windows.append(None if chunked else window)  # for the cache one and the same
        if named is not None and index < len(named):
            types.append(named[index])
        else:
            types.append("full_attention" if window is None else "sliding_attention")
    return tuple(types), tuple(windows)


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The generation config decides, as in `generate`; the model config where that says nothing."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
