"""Learning what a config's model keeps and multiplies by: it is built and run on the meta device, where tensors have
shapes and no numbers, so that a model of any size takes no memory and hardly any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.cost.architecture import Architecture, CacheLayer, Matrix
from workbench.errors import NotApplicable
from workbench.models import Facts, facts
from workbench.models.decoder import decoder_layers
from workbench.models.linear import linear_of
from workbench.models.quiet import quiet

_SHORT, _LONG = 5, 9  # tokens of the two passes: what grows between them grows by the token
_BLOCKS = 160  # tokens of a third pass, where something grows: what is summed up by blocks shows then
_SOFTMAX = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "top_k")


def architecture(config: Any, name: str, dtype: torch.dtype) -> Architecture:
    """A config's model, computing in `dtype`. Raises NotApplicable, in one line, where it cannot be told.

    config: of transformers. name: how the user calls it.
    """
    model = blank(config, dtype)
    known = facts(model, name=name)
    layers = _cache_layers(config, model, known, dtype)
    found = tuple(matrices(model))
    width, gated = _widened(found, known, layers)
    first = next((layer for layer in layers if layer.kv_heads), None)
    if first is not None:
        known = replace(known, kv_heads=first.kv_heads, head_dim=first.key_width)
    return Architecture(
        name=name,
        facts=known,
        dtype=dtype,
        layers=layers,
        matrices=found,
        weight_nbytes=sum(weight.nbytes for weight in model.parameters()),
        intermediate=width,
        gated=gated,
    )


def _widened(found: tuple[Matrix, ...], known: Facts, layers: tuple[CacheLayer, ...]) -> tuple[int, bool]:
    """What a layer's MLP widens a token to, all experts that act together, and whether by two matrices (gated)."""
    heads = known.heads * max((layer.value_width for layer in layers), default=0)  # attention's output comes from these
    inner = max((each for each in found[:-1] if each.columns != heads), key=_acting, default=None)
    if inner is None:
        return known.hidden_size, True
    stem = inner.path.rpartition(".")[0]
    same = (each for each in found if each is not inner and each.share == inner.share and each.columns == inner.rows)
    wide = sum(each.rows for each in same if each.path.startswith(stem))
    return round(_acting(inner)), wide >= 2 * inner.columns


def _acting(matrix: Matrix) -> float:
    return matrix.columns * matrix.experts * matrix.share


def blank(config: Any, dtype: torch.dtype) -> Any:
    """The config's causal model on the meta device. Raises NotApplicable where transformers has none of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotApplicable(f"{config.model_type}: transformers has no causal language model of this kind")
    config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # what a recipe makes of the weights is asked of the plain ones
    for part in (config, config.get_text_config()):
        part._experts_implementation = "batched_mm"  # noqa: SLF001  the one without shapes that follow from numbers
        part.use_cache = True
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet(), torch.device("meta"):
        try:
            model = made._from_config(config, dtype=dtype, attn_implementation="eager")  # noqa: SLF001  Auto's own way
        except Exception as error:  # every config has its own way to fail
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise NotApplicable(f"{config.model_type}: transformers cannot build this config ({said})") from error
    return model.eval()


def _cache_layers(config: Any, model: Any, known: Facts, dtype: torch.dtype) -> tuple[CacheLayer, ...]:
    long = _kept(config, model, _LONG, dtype)
    states = any(name not in ("keys", "values") for kept in long for name in kept)
    short = _kept(config, model, _SHORT, dtype) if states else []  # keys alone say themselves how they grow
    text: Any = model.config.get_text_config(decoder=True)
    layers: list[CacheLayer] = []
    for index in range(max(known.layers, len(long))):
        window = known.windows[index] if index < len(known.windows) else None
        chunk = known.chunks[index] if index < len(known.chunks) else None
        before, after = (kept[index] if index < len(kept) else {} for kept in (short, long))
        made = _layer(index, before, after, known.model_type)
        if made.kv_heads:
            made = _with_heads(replace(made, window=window, chunk=chunk), text, known.heads)
        elif index < len(known.layer_types) and known.layer_types[index] in _SOFTMAX:
            made = _sharing(made, layers, known.layer_types)
        layers.append(made)
    if any(layer.token_nbytes for layer in layers):
        _check_growth(layers, _kept(config, model, _BLOCKS, dtype), known.model_type)
    if not any(layer.attends or layer.state_nbytes for layer in layers):
        raise NotApplicable(f"{known.model_type}: its model keeps no cache that could be told from its config")
    return tuple(layers)


def _with_heads(layer: CacheLayer, text: Any, heads: int) -> CacheLayer:
    """A layer with the heads that its attention sees, where its cache holds what they are made of."""
    rank, rotated = getattr(text, "kv_lora_rank", None), getattr(text, "qk_rope_head_dim", None)
    if not isinstance(rank, int) or not isinstance(rotated, int) or rank <= 0:
        return layer
    layer = replace(layer, latent=(rank, rotated))
    if layer.entry != rank + rotated:
        return layer
    return replace(layer, kv_heads=heads, key_width=text.qk_nope_head_dim + rotated, value_width=text.v_head_dim)


def _sharing(layer: CacheLayer, before: list[CacheLayer], types: tuple[str, ...]) -> CacheLayer:
    """A layer that attends and has no keys: it reads those of the last of its kind before it."""
    alike = (other for other in reversed(before) if other.kv_heads and types[other.layer] == types[layer.layer])
    source = next(alike, None)
    if source is None:
        return layer
    return replace(layer, shared=source.layer, window=source.window, chunk=source.chunk)


def _check_growth(layers: list[CacheLayer], kept: list[dict[str, Tensor]], kind: str) -> None:
    """Raise NotApplicable where what grew by a token over a few does not over many."""
    for layer, held in zip(layers, kept, strict=False):
        states = sum(tensor.nbytes for name, tensor in held.items() if name not in ("keys", "values"))
        if states != layer.state_nbytes + layer.token_nbytes * _BLOCKS:
            raise NotApplicable(f"{kind}: layer {layer.layer} sums up its cache by blocks, which is not modelled")


def _layer(index: int, short: Mapping[str, Tensor], long: Mapping[str, Tensor], kind: str) -> CacheLayer:
    keys, values = long.get("keys"), long.get("values")
    odd = NotApplicable(f"{kind}: layer {index} keeps what grows neither by the token nor not at all")
    made = CacheLayer(index)
    if keys is not None and values is not None and keys.numel():
        if keys.shape[2] != _LONG or (short and short["keys"].shape[2] != _SHORT):
            raise odd
        entry = keys.shape[1] * keys.shape[3] + values.shape[1] * values.shape[3]
        made = replace(made, kv_heads=keys.shape[1], key_width=keys.shape[3], value_width=values.shape[3], entry=entry)
    fixed = by_token = 0
    for name, tensor in long.items():
        if name in ("keys", "values"):
            continue
        before = short[name].nbytes if name in short else 0
        if tensor.nbytes == before:
            fixed += tensor.nbytes
        elif tensor.nbytes * _SHORT == before * _LONG:
            by_token += tensor.nbytes // _LONG
        else:
            raise odd
    return replace(made, state_nbytes=fixed, token_nbytes=by_token)


def _kept(config: Any, model: Any, tokens: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What each layer's cache holds after so many tokens, by name."""
    source: Any = model
    text = config.get_text_config(decoder=True)
    if type(text) is not type(config):
        try:
            source = blank(text, dtype)  # what reads text alone; its towers keep nothing
        except NotApplicable:
            source = model
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode(), quiet(), _Unrouted():
            done = source(input_ids=ids, use_cache=True)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise NotApplicable(
            f"{config.model_type}: its pass follows the numbers in it, so what it keeps cannot be told from its config "
            f"alone ({said})"
        ) from error
    cache = getattr(done, "past_key_values", None)
    if cache is None:
        cache = getattr(done, "cache_params", None)
    cache = getattr(cache, "self_attention_cache", cache)
    kept = [dict(_tensors(layer)) for layer in getattr(cache, "layers", ())]
    for name, states in () if cache is None else vars(cache).items():  # one a layer, beside the layers
        if not isinstance(states, list) or not any(isinstance(state, Tensor) for state in states):
            continue
        kept.extend({} for _ in range(len(states) - len(kept)))
        for layer, state in zip(kept, states, strict=False):
            if isinstance(state, Tensor):
                layer[name] = state
    return kept


class _Unrouted(TorchDispatchMode):
    """Lets loops over the experts that some token chose run none: on the meta device no token has chosen any."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(0, args[0].ndim, dtype=torch.int64, device=args[0].device)
        return func(*args, **(kwargs or {}))


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(layer).items():
        if name.startswith("_"):
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if isinstance(value, Tensor):
            yield name, value
        yield from ((f"{name}.{key}", item) for key, item in items if isinstance(item, Tensor))


def matrices(model: Any) -> Iterator[Matrix]:
    """The matrices that a blank model multiplies a token of text by, in every place where they stand, the head last."""
    text: Any = model.config.get_text_config(decoder=True)
    try:
        starts = tuple(f"{name}." for name in decoder_layers(model))
    except NotApplicable:  # layers that no list has one by one
        starts = ("",)
    head = model.get_output_embeddings()
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    reading = {id(module) for module in decoder.modules()} if decoder is not None else set()
    active = next((count for name in _ACTIVE if isinstance(count := getattr(text, name, None), int) and count), 1)
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_modules(remove_duplicate=False):
        start = next((start for start in starts if name.startswith(start)), None)
        if module is head or isinstance(module, nn.Embedding) or (start is None and id(module) not in reading):
            continue
        short = name if start is None else name.removeprefix(start)
        linear = linear_of(module)
        if linear is not None:
            listed = _listed(name)
            share = 1.0 if listed is None else min(active / lists[listed], 1.0)
            rows, columns = linear.weight.shape
            yield Matrix(short, rows, columns, linear.weight.nbytes, name, share=share)
            continue
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and start is not None and not isinstance(module, nn.Conv1d):  # experts [e, o, i]
                experts, rows, columns = weight.shape
                share = min(active / experts, 1.0)
                yield Matrix(f"{short}.{key}", rows, columns, weight.nbytes, name, experts, share)
            elif weight.ndim == 2 and start is not None:
                rows, columns = weight.shape
                yield Matrix(f"{short}.{key}", rows, columns, weight.nbytes, name)
    if head is not None:
        rows, columns = head.weight.shape
        yield Matrix("output head", rows, columns, head.weight.nbytes, "output head")


def _listed(name: str) -> str | None:
    """The list of experts that a module of this name stands in; None where it is in none."""
    path, _, rest = name.rpartition(".experts.")
    return f"{path}.experts" if rest and rest.partition(".")[0].isdigit() else None
