"""A decode step that a CUDA graph can hold, so that a GPU generates many tokens without Python between them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of, devices_of, forward
from workbench.errors import NotApplicable
from workbench.kv.stores.capabilities import Capturable, Scheduled
from workbench.kv.stores.rows import Rows
from workbench.measure.memory import tensor_bytes
from workbench.runtime.decode import Decoder
from workbench.runtime.evicting_step import EvictingLayer, Foretold, Places, ScheduledLayer
from workbench.runtime.fused_step import FusedStep
from workbench.runtime.no_waiting import NoWaiting
from workbench.runtime.plain_layers import device_weight, plain_layers
from workbench_kernels import Scoring
from workbench_kernels.rows import Ragged

EVERY = 8  # steps after which the host looks at the tokens
WORTH = 16  # steps for which capturing pays: it costs about four of those that it saves
_CUBLAS = 2 * (32 << 20)  # what cuBLAS takes for its products: once for each of the two streams, on Hopper


def refusal(decoder: Decoder, steps: int = 1) -> str | None:
    """Why so many of the decoder's steps cannot be captured, or None if they can, as far as its stores tell."""
    if len(devices_of(decoder.model)) > 1:
        return "the model lies on several devices"
    if decoder.turns(steps):
        return "on the way its attention begins another chunk"
    if decoder.evicting is not None and any(
        store.evictable and not store.rescored and store.replaceable is None for store in decoder.stores
    ):
        return f"{decoder.evicting.key} makes room while decoding"
    if decoder.attention is not None:
        return f"{decoder.attention.key} attends in its own way while decoding"
    if decoder.images is not None and decoder.images.coordinates is not None:
        return "the images of the prompt take other positions than their tokens"
    if decoder.states is not None:
        return "some layers keep another state than keys and values"
    if decoder.outputs is not None:
        return "each layer's outputs are recorded"
    evicts = decoder.evicting is not None
    others = {
        type(store).__name__
        for store in decoder.stores
        if store.capturable is None and not (evicts and store.replaceable is not None)
    }
    return f"{', '.join(sorted(others))} cannot grow on the device alone" if others else None


def note(decoder: Decoder) -> str | None:
    """What a run by captured steps has to say: where they differ from the published order of things."""
    periods = [store.capturable.period for store in decoder.stores if store.capturable is not None]
    if not any(periods):
        return None
    return (
        "decoded by a CUDA graph, between whose replays entries are quantised or pruned: what leaves the exact tail "
        f"one token at a time otherwise leaves it up to {max(period or 0 for period in periods)} tokens at a time"
    )


def predicted_nbytes(decoder: Decoder, max_new_tokens: int) -> int:
    """The most bytes that will be alive on the device while captured steps generate so many tokens.

    The model's weights, the stores with the room that will be reserved in them, and the workspace of a step.
    """
    model = decoder.model
    config = model.config.get_text_config()
    itemsize = device_weight(model).itemsize
    stores = 0
    for store in decoder.stores:
        if (capturable := store.capturable) is not None:
            stores += sum(rows.reserved_nbytes(more) for rows, more in capturable.room_for(max_new_tokens))
            stores += capturable.fixed_nbytes
    hidden: int = 16 * itemsize * (config.hidden_size + config.intermediate_size)
    logits: int = config.vocab_size * (itemsize + 4)
    return tensor_bytes([*model.parameters(), *model.buffers()]) + stores + hidden + logits + _CUBLAS


class CapturedStep:
    """Greedy decoding, a token a call, on tensors that stay where they are.

    Token, position, and the length of each head's rows are on the device and advance there; the stores' own numbers
    follow when steps are over (`answer` does both). On a CUDA device calls are replayed from a graph; elsewhere they
    run as they are. Values of a PackedStore, which leave its tail one at a time otherwise, leave in blocks: when keys
    do, or when `residual` of them wait (if that is 0, a group).
    """

    def __init__(self, decoder: Decoder, token: int, steps: int, *, fused: bool = True, graph: bool = True) -> None:
        """token: the last one chosen, not read yet. steps: room is reserved for so many.

        fused: use fused operations between the matrix products where the model's layers are known. graph: capture the
        step where there is a GPU. Raises NotApplicable where the model or a store does not allow it.
        """
        why = refusal(decoder, steps)
        if why is not None:
            raise NotApplicable(why)
        self.decoder, self.model, self.steps = decoder, decoder.model, steps
        self._graph = graph
        device = device_of(decoder.model)
        with torch.inference_mode():
            stores = list(_capturable(decoder, steps))
            self._overwriting = [store for store in stores if isinstance(store, _OVERWRITING)]
            for store in stores:
                if store.steps_until_settled == 0:
                    store.settle()
                for rows, more in store.room_for(steps):
                    rows.reserve(more)
                    if rows.longest == 0:  # what is masked must be a number too
                        rows.data.zero_()
            growing = [rows for store in stores for rows in store.growing]
            sizes = [rows.heads for rows in growing]
            # One tensor each, so that one operation advances all heads of all layers.
            self._lengths = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
            self._counters = torch.zeros(sum(sizes) + 2, dtype=torch.long, device=device)
            self._grow = torch.ones_like(self._lengths)
            replacing = (isinstance(store, _OVERWRITING) and store.replaces for store in stores)
            both = [sum(sizes[i : i + 2]) for i in range(0, len(sizes), 2)]
            for part, stays in zip(self._grow.split(both), replacing, strict=True):
                part.fill_(not stays)
            self._position, self._written = self._counters[-2:-1], self._counters[-1:]
            self._position.fill_(decoder.position)
            lengths, ends = self._lengths.split(sizes), self._counters[:-2].split(sizes)
            self._layers = [
                _Layer(store, steps, lengths[2 * i : 2 * i + 2], ends[2 * i : 2 * i + 2], self._position)
                for i, store in enumerate(stores)
            ]
            self._token = torch.tensor([token], device=device)
            self._out = torch.zeros(steps, dtype=torch.long, device=device)
            self._mask = torch.zeros(1, 1, 1, 1, device=device)
        self._seen = torch.empty(steps, dtype=torch.long, pin_memory=device.type == "cuda")
        self._launched = self._settled = self._caught_up = 0
        self._fused = FusedStep(self.model, self._layers) if fused and plain_layers(self.model) else None
        self._replay: Callable[[], object] | None = None
        self.memory = decoder.memory

    @property
    def fused(self) -> bool:
        """Whether the operations between the matrix products are fused."""
        return self._fused is not None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention of one new token over everything that its layer holds, itself included."""
        if scoring.window is not None:
            raise NotApplicable(f"layer {layer} sees a window only")
        if not scoring.in_kernels:  # captured attention knows no position of what is held
            raise NotApplicable(f"layer {layer} scores or chooses by positions")
        self._layers[layer].append(key[:, 0], value[:, 0])
        return self._layers[layer].attend(query, scoring)

    def __call__(self) -> Tensor:
        """Read the token, choose the next one and put it in its place; returns the logits [v]."""
        with torch.inference_mode():
            self._lengths.add_(self._grow)
            if self._fused is not None:
                logits = self._fused(self._token, self._position)
            else:
                logits = forward(self.model, self, self._token, self._position, mask=self._mask)[-1]
            token = logits.argmax(keepdim=True)
            self._out.index_copy_(0, self._written, token)
            self._token.copy_(token)
            self._counters.add_(1)
            return logits

    def prepare(self) -> Callable[[], object]:
        """What makes one step: the replay of a graph on a CUDA device. Nothing has changed when this returns.

        Raises NotApplicable if the model waits for the device in the midst of a step.
        """
        if self._replay is None:
            with torch.inference_mode():
                evicted = (x for store in self._overwriting for x in store.changed)
                changed = (self._lengths, self._counters, self._token, *evicted)
                before = [x.clone() for x in changed]
                if self._token.is_cuda and self._graph:
                    self._replay = self._captured(changed, before)
                else:
                    self._try(changed, before)
                    self._replay = self
        return self._replay

    def _try(self, changed: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Run one step and take it back."""
        try:
            with NoWaiting(self._token.device):
                self()
        finally:
            for x, old in zip(changed, before, strict=True):
                x.copy_(old)

    def _captured(self, changed: Sequence[Tensor], before: Sequence[Tensor]) -> Callable[[], None]:
        stream = torch.cuda.Stream(self._token.device)
        stream.wait_stream(torch.cuda.current_stream(self._token.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels compile, and libraries take their workspace
                self._try(changed, before)
        torch.cuda.current_stream(self._token.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self()
        return graph.replay

    def answer(self, eos: Sequence[int]) -> Iterator[int]:
        """Yield the tokens of all steps, or those up to and including one of `eos`.

        A few steps run ahead of what has been yielded. However this ends, stores and decoder then hold what was read
        to choose the tokens yielded, and no more: the last token has not been read. Where entries are evicted only one
        runs ahead, of a token that ends nothing; who stops there leaves a decoder that has read that token.
        """
        self.prepare()
        kept = 0
        waiting: tuple[int, int, torch.cuda.Event | None] | None = None
        try:
            while self._launched < self.steps or waiting is not None:
                begun = None
                # What was quantised or written over cannot be taken back: first see whether the answer has ended.
                if self._launched < self.steps and (waiting is None or (self.due > 0 and not self._overwriting)):
                    begun = self.launch(min(self._every, self.steps - self._launched))
                tokens = [] if waiting is None else self._tokens(*waiting)
                if self._overwriting and tokens and tokens[-1] not in eos and self._launched < self.steps:
                    begun = self.launch(1)
                if self._overwriting:
                    self._catch_up(self._launched)  # while the device works
                for token in tokens:
                    kept += 1
                    yield token
                    if token in eos:
                        return
                waiting = begun
        finally:
            self._end(self._launched if self._overwriting else kept)

    @property
    def _every(self) -> int:
        """Steps after which the host looks at the tokens."""
        return 1 if self._overwriting else EVERY

    @property
    def due(self) -> int:
        """Steps after which entries have to be quantised before another one."""
        return self._settled + min(layer.until for layer in self._layers) - self._launched

    def launch(self, steps: int) -> tuple[int, int, torch.cuda.Event | None]:
        """Begin up to `steps` more, quantising first what is due; returns where their tokens will be found."""
        replay = self.prepare()
        if self.due <= 0:
            self._settle()
        first, self._launched = self._launched, self._launched + min(steps, self.due)
        with torch.inference_mode():
            for _ in range(first, self._launched):
                replay()
            tokens = self._out[first : self._launched]
            self._seen[first : self._launched].copy_(tokens, non_blocking=True)
        event = None
        if self._token.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return first, self._launched, event

    def _tokens(self, first: int, last: int, event: torch.cuda.Event | None) -> list[int]:
        if event is not None:
            event.synchronize()
        return list(self._seen[first:last].tolist())

    def _catch_up(self, steps: int) -> None:
        """Let the stores know of all rows up to those of the first `steps` steps."""
        more = steps - self._caught_up
        if more:
            self.decoder.advance(more, [layer.store for layer in self._layers])
        self._caught_up = steps

    def _settle(self) -> None:
        with torch.inference_mode():
            self._catch_up(self._launched)
            self._settled = self._launched
            for layer in self._layers:
                layer.settle()

    def _end(self, kept: int) -> None:
        with torch.inference_mode():
            self._catch_up(kept)


def _capturable(decoder: Decoder, steps: int) -> Iterator[Capturable]:
    """What steps write into, layer by layer."""
    foretold: Foretold = {}
    evicting = decoder.evicting
    for store, capacity in zip(decoder.stores, decoder.capacity, strict=True):
        capturable, replaceable, rescored = store.capturable, store.replaceable, store.rescored
        schedule = None if evicting is None or rescored is None or capturable is None else rescored.schedule(steps)
        if schedule is not None:
            yield ScheduledLayer(cast("Scheduled", capturable), schedule, decoder.position)
        elif evicting is not None and rescored is None and replaceable is not None:
            yield EvictingLayer(replaceable, evicting, capacity or 0, decoder.position, steps, foretold)
        elif capturable is not None:
            yield capturable


_OVERWRITING = (EvictingLayer, ScheduledLayer)


def capture(decoder: Decoder, token: int, steps: int) -> CapturedStep:
    """Captured steps that go on from `token`, the last one chosen. Raises NotApplicable with the reason."""
    step = CapturedStep(decoder, token, steps)
    step.prepare()
    return step


class _Static:
    """Rows whose starts and lengths are in tensors of their own, that never move."""

    def __init__(self, rows: Rows, longest: int, lengths: Tensor | None = None, ends: Tensor | None = None) -> None:
        """longest: no head will ever have more rows. lengths, ends: where to keep them, if not in new tensors."""
        now = rows.ragged()
        self.rows, self.ends = rows, ends
        self.ragged = Ragged(
            rows.data, now.starts.clone(), torch.empty_like(now.lengths) if lengths is None else lengths, longest
        )
        self.refresh()

    def refresh(self) -> None:
        """Take over what the host did to the rows."""
        now = self.rows.ragged()
        assert now.data.data_ptr() == self.ragged.data.data_ptr(), "rows moved: no room was reserved"
        self.ragged.starts.copy_(now.starts)
        self.ragged.lengths.copy_(now.lengths)
        if self.ends is not None:
            self.ends.copy_(now.starts + now.lengths)


class _Pins:
    """What the layers' stores know of a step's places; see `Pin`."""

    def __init__(self, position: Tensor) -> None:
        self.position = position
        self.rows: list[_Static] = []

    def __call__(self, rows: Rows, longest: int) -> Ragged:
        self.rows.append(_Static(rows, longest))
        return self.rows[-1].ragged


class _Layer:
    """One layer's store, as a step uses it."""

    def __init__(
        self, store: Capturable, steps: int, lengths: Sequence[Tensor], ends: Sequence[Tensor], position: Tensor
    ) -> None:
        """lengths int32 and ends int64, [k] each, of the rows that a new key and value join: where to keep them."""
        self.store = store
        self._grown = [
            _Static(rows, min(rows.longest + steps, bound), *places)
            for rows, bound, *places in zip(store.growing, store.most_rows(steps), lengths, ends, strict=True)
        ]
        self.pins = _Pins(position)
        keys, values = (static.ragged for static in self._grown)
        self._attention = store.captured_attention(keys, values, steps, self.pins)
        self._count_down()

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where a new key goes, [t, d] and row numbers [k], and a new value."""
        keys, values = self._grown
        assert keys.ends is not None
        assert values.ends is not None
        if isinstance(self.store, _OVERWRITING):
            places = (Places(static.ends, static.ragged.lengths) for static in self._grown if static.ends is not None)
            self.store.take_in(self.pins.position, *places)
        return keys.rows.data, keys.ends, values.rows.data, values.ends

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write key [k, d] and value [k, dv] behind the others; the step has counted them already."""
        keys, key_ends, values, value_ends = self.rows
        keys.index_copy_(0, key_ends, key.to(keys.dtype))
        values.index_copy_(0, value_ends, value.to(values.dtype))

    def attend(self, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of query [h, 1, d] over everything held: [h, 1, dv]."""
        return self._attention(query, scoring)

    def settle(self) -> None:
        """Do what is due between steps: quantise what waits in the tail, let entries leave or move, in place."""
        if self.until != sys.maxsize:
            self.store.settle()
            for static in (*self._grown, *self.pins.rows):
                static.refresh()
            self._count_down()

    def _count_down(self) -> None:
        """Count the steps until something is due."""
        until = self.store.steps_until_settled
        self.until = sys.maxsize if until is None else until
