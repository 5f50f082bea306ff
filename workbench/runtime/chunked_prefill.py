"""Reading a prompt in bounded memory: a method feeds it to the model in pieces, and its caches stay within a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of, forward
from workbench.engine.states import States
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod, Study
from workbench.kv.chunked_prefill import ChunkedPrefill, Observer, PrefillResult
from workbench.kv.stores import Store, kv_categories
from workbench.kv.stores.store import seen_by
from workbench.measure.memory import HOST, CudaBytes, LiveBytes, Timeline, live_bytes, tensor_bytes
from workbench.measure.timing import Stopwatch
from workbench.models.rotary import switch, switch_notes
from workbench.runtime.continuing import fresh_states
from workbench.runtime.decode import Decoder
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.core.rope import Rotation

_REMEMBERED = 4  # prefills of a method at different budgets, or for different questions, that a trace remembers


@dataclass(kw_only=True)
class ModelPrefill(ChunkedPrefill):
    """A chunked prefill that really runs the model, and notes on a timeline what is alive meanwhile.

    live: what the pass takes beside weights and caches. most_nbytes: the most bytes that the caches have held. states:
    of layers that keep another state than keys and values, carried from piece to piece; they are no part of the limit.
    """

    timeline: Timeline
    live: LiveBytes | CudaBytes
    weight_nbytes: int
    most_nbytes: int = field(init=False, default=0)
    states: States | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.states = self._unread = fresh_states(self.model)

    def reset(self) -> None:
        super().reset()
        self.states = self._unread

    def feed(
        self,
        ids: Tensor,
        observer: Observer | None = None,
        stores: Sequence[Store] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        used = list(stores or self.stores)
        if stores is not None and self.states is not None:
            raise NotApplicable(
                f"{self.label} reads into caches beside its own, which is not supported where layers keep another "
                "state than keys and values: it would not be that of what those caches hold"
            )
        if any(store.reach is None for store in used):
            self.check_positions(self.position + ids.numel() if positions is None else int(positions[-1]) + 1)
        decoder = _ObservedDecoder(
            self.model, used, self.position, progress=self.progress, observer=observer, states=self.states
        )
        decoder.images = self.prompt.images
        decoder.reserve(ids.numel())
        self.logits = decoder.feed(ids, positions=positions)[-1].cpu()
        if stores is None:
            self.stores = decoder.stores  # some layers may have begun another chunk
        elif any(now is not before for now, before in zip(decoder.stores, stores, strict=True)):
            raise NotApplicable(
                f"{self.label} reads on from a cache that it keeps, over the edge of a chunk of this model's "
                "attention; shorten the text"
            )
        self.position, self.states = decoder.position, decoder.states
        self._sample()
        return self.logits

    def feed_below(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.states is not None:
            raise NotApplicable(
                f"{self.label} lets only the lower layers read, which is not supported where layers keep another state "
                "than keys and values: those above would miss what was read"
            )
        self.check_positions(self.position + ids.numel())
        decoder = _LowerLayers(self.model, list(self.stores), self.position, progress=self.progress, last=layer)
        decoder.images = self.prompt.images
        for store in self.stores[:layer]:
            store.reserve(ids.numel())
        queries_and_keys = decoder.stop(ids)
        self.position += ids.numel()
        self._sample()
        return queries_and_keys

    def probe(self, ids: Tensor, score: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        probe = _Probe(self, score)
        states = None if self.states is None else self.states.on(self.label)
        at = torch.arange(self.position, self.position + ids.numel())
        if self.prompt.images is not None and self.prompt.images.among(ids):
            raise NotApplicable(f"{self.label} has the model read tokens of images apart from their text")
        after = self.tokens + torch.arange(ids.numel())  # they are no tokens of the prompt
        forward(self.model, probe, ids, at, cache=states, images=self.prompt.images, places=after)
        return [probe.scores[layer.index] for layer in self.compressible]

    def _sample(self) -> None:
        """Note on the timeline what is alive now."""
        kv = kv_categories(self.stores)
        here = sum(nbytes for name, nbytes in kv.items() if self.device.type == "cpu" or not name.startswith(HOST))
        state = {} if self.states is None else {"state": self.states.nbytes}
        here += sum(state.values())
        self.most_nbytes = max(
            self.most_nbytes, sum(nbytes for name, nbytes in kv.items() if not name.startswith(HOST))
        )
        self.timeline.add(
            "read",
            self.position,
            {"weights": self.weight_nbytes, **kv, **state, "activations": max(self.live.peak - here, 0)},
            [store.nbytes for store in self.stores],
            numbers=[layer.called for layer in self.layers],
        )
        self.live.reset_peak()


@dataclass
class _ObservedDecoder(Decoder):
    """A decoder that shows what each layer read."""

    observer: Observer | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        out = super().attend(layer, query, key, value, scoring)
        if self.observer is not None:
            self.observer(layer, query, key, value)
        return out


class _Stopped(Exception):
    """The forward pass has come to the last layer that is needed."""


@dataclass
class _LowerLayers(Decoder):
    """A decoder that leaves the model at layer `last`, before its attention."""

    last: int = 0
    seen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def stop(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The queries [h, p, d] and keys [k, p, d] of the last layer."""
        with suppress(_Stopped):
            self.feed(ids)
        assert self.seen is not None
        return self.seen

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if layer == self.last:
            self.seen = query, key
            raise _Stopped
        return super().attend(layer, query, key, value, scoring)


@dataclass
class _Probe:
    """One pass over some tokens that attend to what is held and to each other, and leave nothing."""

    prefill: ModelPrefill
    score: Callable[[int, Tensor], Tensor]
    scores: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        prefill, count = self.prefill, key.shape[1]
        prefill.progress.check()
        earlier = prefill.stores[layer].contents(query.dtype)
        kv_heads, slots = earlier.keys.shape[:2]
        probing = torch.arange(prefill.position, prefill.position + count, device=query.device)
        valid = None
        if earlier.valid is not None:
            valid = torch.cat([earlier.valid, earlier.valid.new_ones(kv_heads, count)], dim=1)
        positions = torch.cat([earlier.positions.expand(kv_heads, -1), probing.expand(kv_heads, -1)], dim=1)
        scored = layer not in prefill.exact
        out, weights = attend(
            query,
            torch.cat([earlier.keys, key], dim=1),
            torch.cat([earlier.values, value], dim=1),
            scoring,
            visible=seen_by(probing, positions, valid, scoring),
            offsets=scoring.offsets(probing, positions),
            weights=scored,
        )
        if scored and weights is not None:
            self.scores[layer] = self.score(layer, weights[..., :slots])
        return out


def _blank(trace: Trace, model: PreTrainedModel) -> tuple[LayerTrace, ...]:
    """The trace's layers without data, as a reading in pieces has them."""
    layers, until = tuple(layer.blank() for layer in trace.layers), switch(model)
    if until is None or trace.tokens <= until:
        return layers
    return tuple(replace(layer, rotary=partial(_switched, until)) for layer in layers)


def _switched(until: int, read: int) -> Rotation:
    raise NotApplicable(
        f"keys that are read in pieces are rotated by several tables where the model's switches at {until} tokens; "
        f"methods that rotate keys cannot read this prompt of {read} tokens in pieces"
    )


@dataclass(frozen=True)
class FinishedPrefill:
    """A chunked prefill that has ended: its result, and what it took.

    seconds: how long. most_nbytes: the most bytes that the caches held meanwhile. states: what layers that keep another
    state than keys and values remember of what was read.
    """

    result: PrefillResult
    timeline: Timeline
    seconds: float
    most_nbytes: int
    states: States | None = None


def chunked_prefill(
    study: Study, method: KVMethod, dtype: torch.dtype, limit: int | None, question: Tensor | None
) -> FinishedPrefill:
    """The method's prefill of the prompt within `limit` bytes; the last few are remembered with the trace.

    Raises what the method raises, and Cancelled, between layers.
    """
    trace, model = study.trace, study.reader(method.key)
    remembered: OrderedDict[object, FinishedPrefill] = trace.once(
        ("chunked prefill", method.parameter_key()), OrderedDict
    )
    asked = question if method.question_aware else None
    key = (limit, dtype, None if asked is None else tuple(asked.tolist()))
    if key not in remembered:
        device = device_of(model)
        timeline, watch = Timeline("read"), Stopwatch(device)
        with watch("read"), live_bytes(device) as live:
            prefill = ModelPrefill(
                model=model,
                device=device,
                prompt=trace.prompt,
                layers=_blank(trace, model),
                exact=frozenset(trace.exact),
                dtype=dtype,
                limit=limit,
                question=asked,
                progress=study.progress,
                timeline=timeline,
                live=live,
                weight_nbytes=tensor_bytes([*model.parameters(), *model.buffers()]),
                label=method.key,
            )
            result = method.read(prefill)
            result = replace(result, notes=(*result.notes, *switch_notes(model, 0, trace.tokens)))
        remembered[key] = FinishedPrefill(result, timeline, watch.seconds["read"], prefill.most_nbytes, prefill.states)
        while len(remembered) > _REMEMBERED:
            remembered.popitem(last=False)
    remembered.move_to_end(key)
    return remembered[key]
