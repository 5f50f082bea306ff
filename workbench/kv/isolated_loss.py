"""What the model's predictions lose when one layer alone is held in another way, and the stores that this takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workbench.kv.method import Study
from workbench.kv.stores import DenseStore, SlidingStore, Store
from workbench.kv.stores.format import Format
from workbench.measure.quality import divergence
from workbench.trace import LayerTrace, Trace


def stores_before(trace: Trace, count: int, made: Callable[[int, LayerTrace], Store]) -> list[Store]:
    """Stores of the first `count` tokens of the prompt, one a layer: of those that may be compressed what `made` makes
    of their place among these and of the layer cut to those tokens, of all others everything.
    """
    place = {layer.index: number for number, layer in enumerate(trace.compressible)}
    stores: list[Store] = []
    for layer in trace.layers:
        cut = replace(layer, keys_held=layer.keys[:, :count], values_held=layer.values[:, :count])
        if layer.index in place:
            stores.append(made(place[layer.index], cut))
        elif layer.window is not None:
            stores.append(SlidingStore.of(cut.keys, cut.values, layer.window, cut.keys.dtype))
        else:
            stores.append(whole(cut))
    return stores


def whole(layer: LayerTrace) -> Store:
    """Everything of a layer, as it was recorded."""
    everything = torch.ones(layer.keys.shape[:2], dtype=torch.bool, device=layer.keys.device)
    return DenseStore.where(layer.keys, layer.values, everything, layer.keys.dtype)


def isolated_losses(study: Study, key: str, formats: Sequence[Format], window: int) -> Tensor:
    """By how much the predictions of the prompt's last `window` tokens diverge when one layer alone is held in one of
    the formats, and all others are whole: float64 [l, v], nats a token, l layers that may be compressed.

    The last tokens (at most half) are read again over what stands before them. key: of the method that asks. Raises
    NotApplicable where no model is there to read.
    """
    trace = study.trace
    first = trace.tokens - min(window, trace.tokens // 2)
    ids = trace.ids[first:]

    def predictions(made: Callable[[int, LayerTrace], Store]) -> Tensor:
        return study.forced(key, stores_before(trace, first, made), first, ids).log_softmax(-1)

    def alone(at: int, form: Format) -> float:
        def made(place: int, layer: LayerTrace) -> Store:
            every = torch.ones(layer.keys.shape[:2], dtype=torch.uint8, device=layer.keys.device)
            return form.build(layer, every, None) if place == at else whole(layer)

        return float(divergence(exact, predictions(made)).mean())

    exact = predictions(lambda _, layer: whole(layer))
    layers = range(len(trace.compressible))
    track = study.progress.track(layers, f"measuring layers by {key}", len(layers))
    return torch.tensor([[alone(layer, form) for form in formats] for layer in track], dtype=torch.float64)
