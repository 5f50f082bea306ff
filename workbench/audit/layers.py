"""What a model's layers attend to or keep, and whether methods may change that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.models import Facts
from workbench.models.findings import Finding, Standing
from workbench.trace import LayerTrace, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Words of transformers for layers that keep something else than keys and values, in the field's.
_STATES = {
    "linear_attention": "linear attention or a state space",  # of hybrid models it is the word for both
    "mamba": "state space",
    "conv": "convolution",
    "recurrent": "recurrence",
    "hybrid": "state space beside attention",
    "moe": "no attention (experts)",
    "mlp": "no attention (MLP)",
}
_STATE = "it keeps a state of fixed size, no keys and values"
_NOTHING = "it keeps nothing of the text"
_CHUNK = "while the prompt is within one chunk; of a longer one it holds the newest chunk, exactly"


def attention_findings(
    model: PreTrainedModel, facts: Facts, trace: Trace | None, otherwise: Standing, why: str
) -> tuple[Finding, ...]:
    """One finding a layer. trace: what reading recorded; None: nothing, and every layer has the standing `otherwise`
    for the reason `why`, with kinds and sizes as the config has them.
    """
    config: Any = model.config.get_text_config(decoder=True)
    rank = getattr(config, "kv_lora_rank", None) or None
    seen = {} if trace is None else {layer.called: layer for layer in trace.layers}
    return tuple(
        _recorded(seen[index], trace, rank, beside=facts.layer_types[index] == "hybrid")
        if trace is not None and index in seen
        else _named(index, facts, rank, otherwise, why)
        for index in sorted({*range(facts.layers), *seen})
    )


def _recorded(layer: LayerTrace, trace: Trace, rank: int | None, *, beside: bool) -> Finding:
    """beside: whether the layer keeps a state beside its keys and values."""
    why = trace.exact.get(layer.index, "")
    return Finding(
        "attention",
        (layer.called,),
        "",
        _kind(layer, trace, rank, beside=beside),
        "exact" if why else "compressible",
        why or (_CHUNK if layer.chunk is not None else ""),
        layer.heads,
        layer.kv_heads,
        layer.keys_held.shape[-1],
        layer.values_held.shape[-1],
    )


def _kind(layer: LayerTrace, trace: Trace, rank: int | None, *, beside: bool) -> str:
    if layer.shared is not None:
        return f"shares the KV of layer {trace.layers[layer.shared].called}"
    scoring = layer.scoring
    besides = {
        "learned sinks": scoring.sinks is not None,
        "ALiBi": scoring.slopes is not None,
        f"scores capped at {scoring.softcap}": scoring.softcap is not None,
        "positions chosen by an indexer": scoring.chosen is not None,
        "a state beside it": beside,
    }
    latent = None if rank is None else f"{_latent(rank)}, held as keys and values"
    latent = latent if layer.latents is None else layer.latents.kind
    return _attention(layer.window, layer.chunk, latent, *(words for words, there in besides.items() if there))


def _latent(rank: int) -> str:
    return f"MLA of rank {rank}"


def _attention(window: int | None, chunk: int | None, latent: str | None, *besides: str) -> str:
    reach = "full attention" if window is None else f"sliding window of {window}"
    reach = reach if chunk is None else f"chunks of {chunk}"
    return ", ".join([reach, *([] if latent is None else [latent]), *besides])


def _named(index: int, facts: Facts, rank: int | None, otherwise: Standing, why: str) -> Finding:
    """A layer as the config has it, of a model that was not read or in a layer that does not attend."""
    word, window = facts.layer_types[index], facts.windows[index]
    if word in _STATES or not ("attention" in word or window):
        kind = _STATES.get(word, word.replace("_", " "))
        keeps = _NOTHING if kind.startswith("no attention") else _STATE
        if otherwise == "compressible":
            return Finding("attention", (index,), "", kind, "exact", keeps)
        return Finding("attention", (index,), "", kind, otherwise, why)
    chunk = facts.chunks[index] if facts.chunks else None
    size = None if rank is not None else facts.head_dim
    kind = _attention(window, chunk, None if rank is None else _latent(rank))
    return Finding("attention", (index,), "", kind, otherwise, why, facts.heads, facts.kv_heads, size, size)
