"""Channel statistics of a whole model as one table: where keys, values, activations or weights have outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from workbench import arguments
from workbench.core.causal_attention import causal_attention
from workbench.engine.attention_hook import engaged, forward
from workbench.errors import NotRead
from workbench.measure.outliers import ChannelStats, LayerStats, channel_stats, layer_stats
from workbench.models.decoder import decoder_layers, placed
from workbench.models.linear import linear_of
from workbench.progress import Progress
from workbench.trace import Trace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["keys", "values", "activations", "weights"]


def channel_table(
    kind: Kind,
    model: PreTrainedModel,
    trace: Trace | None = None,
    progress: Progress | None = None,
    *,
    weights: Mapping[str, Callable[[], Tensor]] | None = None,
) -> pd.DataFrame:
    """One row for each layer, head or module, and channel: absmax, kurtosis and share of energy (float32).

    kind: "keys" or "values" (columns layer, head, channel: each KV head for itself, keys after the rotary embedding);
    "activations" (layer, channel: the residual stream as it enters each decoder layer, from one more forward pass over
    the prompt, remembered with the trace); "weights" (layer, module, channel: the input channels of every linear layer
    over its outputs; layer is missing for one outside the layers, such as lm_head; `weights` gives others to look at,
    by name, [outputs, inputs] when called).

    energy adds up to 1 over the channels of a head, layer or module; kurtosis is 3 for a normal distribution and not a
    number for a constant channel. Raises BadParameter for another kind, NotRead where a trace is needed and missing.
    """
    arguments.choice("kind", kind, get_args(Kind))
    progress = progress or Progress()
    if kind == "weights":
        return _weights(model, plain_weights(model) if weights is None else weights, progress)
    if trace is None:
        raise NotRead(f"outliers of {kind} are those of a prompt, and none has been read yet: call read(text) first")
    return trace.once(("channels", kind), lambda: _of_prompt(kind, model, trace, progress)).copy()


def _of_prompt(kind: Kind, model: PreTrainedModel, trace: Trace, progress: Progress) -> pd.DataFrame:
    if kind == "activations":
        return _small(_residual_stream(model, trace, progress).to_frame())
    recorded = {layer.called: layer.keys_held if kind == "keys" else layer.values_held for layer in trace.layers}
    stats: dict[int, ChannelStats] = {}
    for index in progress.track(recorded, f"statistics of {kind}", len(recorded)):
        stats.update(layer_stats({index: recorded[index]}).layers)
    return _small(LayerStats(stats).to_frame())


class _Exact:
    """The model's own attention, without anything being recorded."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        return causal_attention(query, key, value, scoring)


def _residual_stream(model: PreTrainedModel, trace: Trace, progress: Progress) -> LayerStats:
    """Statistics of what enters each decoder layer; taken layer by layer, so that only one hidden state is alive."""
    stats: dict[int, ChannelStats] = {}
    layers = list(decoder_layers(model).values())

    def take(index: int, hidden: Tensor) -> None:  # hidden [1, n, c]
        progress.update("statistics of activations", index, len(layers))
        stats[index] = channel_stats(hidden[0])

    # The lock of `engaged` keeps a run of another session on this model from being watched too.
    with engaged(model), _watching(layers, take):
        forward(model, _Exact(), trace.ids, torch.arange(trace.tokens), images=trace.prompt.images)
    progress.update("statistics of activations", len(layers), len(layers))
    return LayerStats(dict(sorted(stats.items())))


@contextmanager
def _watching(layers: Sequence[nn.Module], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call take(index, hidden) with the input of each layer, until the block ends."""

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            take(index, args[0] if args else kwargs["hidden_states"])

        return see

    handles = [layer.register_forward_pre_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_weights(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The weight [outputs, inputs] of every linear layer by name, as `linear_of` takes it: fused experts, or an
    embedding, are none.
    """
    linears = {name: linear_of(module) for name, module in model.named_modules()}
    return {name: partial(getattr, linear, "weight") for name, linear in linears.items() if linear is not None}


def _weights(model: nn.Module, weights: Mapping[str, Callable[[], Tensor]], progress: Progress) -> pd.DataFrame:
    frames, layers = [], list(decoder_layers(model))
    for name, weight in progress.track(weights.items(), "statistics of weights", len(weights)):
        layer, module = placed(name, layers)
        frame = channel_stats(weight()).to_frame()  # [out, in] -> one row an input channel
        frame.insert(0, "module", module)
        frame.insert(0, "layer", -1 if layer is None else layer)
        frames.append(frame)
    columns = ["layer", "module", "channel", "absmax", "kurtosis", "energy"]
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    table["module"] = pd.Categorical(table["module"], categories=list(dict.fromkeys(table["module"])))
    table["layer"] = table["layer"].astype("Int16").mask(table["layer"] < 0)
    return _small(table)


def _small(table: pd.DataFrame) -> pd.DataFrame:
    """Narrow integers: a table of a large model has millions of rows."""
    narrow = {"layer": "int16", "head": "int16", "channel": "int32"}
    change: Any = {name: kind for name, kind in narrow.items() if name in table and str(table[name].dtype) != "Int16"}
    return table.astype(change)
