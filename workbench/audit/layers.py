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


def attention_findings(
    model: PreTrainedModel, facts: Facts, trace: Trace | None, otherwise: Standing, why: str
) -> tuple[Finding, ...]:
    """One finding a layer. trace: what reading recorded; None: nothing, and every layer has the standing `otherwise`
    for the reason `why`, with kinds and sizes as the config has them.
    """
    config: Any = model.config.get_text_config(decoder=True)
    rank = getattr(config, "kv_lora_rank", None) or None
    seen = {} if trace is None else {layer.index: layer for layer in trace.layers}
    return tuple(
        _recorded(seen[index], trace, rank)
        if trace is not None and index in seen
        else _named(index, facts, rank, otherwise, why)
        for index in range(max(facts.layers, len(seen)))
    )


def _recorded(layer: LayerTrace, trace: Trace, rank: int | None) -> Finding:
    why = trace.exact.get(layer.index, "")
    return Finding(
        "attention",
        (layer.index,),
        "",
        _kind(layer, rank),
        "exact" if why else "compressible",
        why,
        layer.heads,
        layer.kv_heads,
        layer.keys_held.shape[-1],
        layer.values_held.shape[-1],
    )


def _kind(layer: LayerTrace, rank: int | None) -> str:
    if layer.shared is not None:
        return f"shares the KV of layer {layer.shared}"
    return _attention(f"sliding window of {layer.window}" if layer.window else "full attention", rank)


def _attention(reach: str, rank: int | None) -> str:
    return reach if rank is None else f"{reach}, latent (MLA) of rank {rank}"


def _named(index: int, facts: Facts, rank: int | None, otherwise: Standing, why: str) -> Finding:
    """A layer as the config has it, of a model that was not read or in a layer that does not attend."""
    word, window = facts.layer_types[index], facts.windows[index]
    if word in _STATES or not ("attention" in word or window):
        kind = _STATES.get(word, word.replace("_", " "))
        standing, reason = ("exact", _STATE) if otherwise == "compressible" else (otherwise, why)
        return Finding("attention", (index,), "", kind, standing, reason)
    reach = "full attention"
    if window:
        reach = f"chunks of {window}" if word == "chunked_attention" else f"sliding window of {window}"
    size = None if rank is not None else facts.head_dim
    return Finding(
        "attention", (index,), "", _attention(reach, rank), otherwise, why, facts.heads, facts.kv_heads, size, size
    )
