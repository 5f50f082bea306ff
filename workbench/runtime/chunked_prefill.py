"""Reading a prompt in bounded memory: a method feeds it to the model in pieces, and its caches stay within a limit."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.core.bisection import largest
from workbench.engine.attention_hook import device_of, forward
from workbench.errors import BudgetTooSmall, NotApplicable, PromptTooLong
from workbench.kv.base import KVMethod, Study
from workbench.kv.stores import DenseStore, SlidingStore, Store, kv_categories
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, stored_nbytes
from workbench.kv.stores.store import seen_by
from workbench.measure.memory import HOST, CudaBytes, LiveBytes, Timeline, live_bytes, tensor_bytes
from workbench.measure.timing import Stopwatch
from workbench.models import max_positions
from workbench.models.rotary import switch, switch_notes
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.decode import Decoder
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.core.rope import Rotation

_REMEMBERED = 4  # readings of a method at different budgets, or for different questions, that a trace remembers

Watch = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called at each layer with its index and the queries [h, q, d], keys [k, q, d] and values [k, q, dv] just read."""


@dataclass(frozen=True)
class Held:
    """What a reading left: a store for each layer, the logits [v] after the last token, and where the next one stands.

    format: how entries are stored, for its tiers. tiers: where each position of the prompt lies, uint8 [l, k, n];
    None: what the stores say. notes: what a reader of the run should know.
    """

    stores: list[Store]
    logits: Tensor
    position: int
    format: Format
    tiers: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Reading:
    """A prompt to be read, what the method may use for it, and what it has read so far.

    layers: shape and place of each layer, without data. dtype: of the caches. limit: the bytes that all caches together
    may take on the device at any moment, None where nothing limits them. question: the ids [q] that will be asked,
    where they are known. stores: the caches; they begin empty.
    """

    model: PreTrainedModel
    prompt: Prompt
    layers: tuple[LayerTrace, ...]
    exact: frozenset[int]
    dtype: torch.dtype
    limit: int | None
    question: Tensor | None
    progress: Progress
    timeline: Timeline
    live: LiveBytes | CudaBytes
    weight_nbytes: int
    label: str
    stores: list[Store] = field(default_factory=list)
    position: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    most_nbytes: int = 0

    def __post_init__(self) -> None:
        self.device = device_of(self.model)
        self.stores = [self.empty(layer) for layer in self.layers]

    @property
    def ids(self) -> Tensor:
        """The prompt, int64 [n]."""
        return self.prompt.ids

    @property
    def tokens(self) -> int:
        return int(self.ids.numel())

    @property
    def compressible(self) -> tuple[LayerTrace, ...]:
        """The layers that may be compressed; the others keep a store of their own, which needs no attention."""
        return tuple(layer for layer in self.layers if layer.index not in self.exact)

    @property
    def full_nbytes(self) -> int:
        """Bytes of the uncompressed cache of the layers that may be compressed."""
        return sum(self.shape(layer).full_nbytes for layer in self.compressible)

    def shape(self, layer: LayerTrace) -> Shape:
        widths = layer.keys_held.shape[-1], layer.values_held.shape[-1]
        return Shape(layer.kv_heads, self.tokens, *widths, self.dtype.itemsize, layer.index)

    def empty(self, layer: LayerTrace, *, scattered: bool = False) -> Store:
        """A store that holds nothing yet: plain, or a window where the layer slides.

        scattered: for tokens that do not all follow one another from position 0 on.
        """
        widths = layer.keys_held.shape[-1], layer.values_held.shape[-1]
        keys, values = (torch.empty(layer.kv_heads, 0, w, dtype=self.dtype, device=self.device) for w in widths)
        if layer.index in self.exact and layer.window is not None:
            return SlidingStore(keys, values, 0, layer.window)
        everything = keys.new_ones(keys.shape[:2], dtype=torch.bool)
        if scattered:
            return DenseStore.of(keys, values, torch.empty(1, 0, device=self.device), everything, self.dtype)
        return DenseStore.where(keys, values, everything, self.dtype)

    def begin_again(self) -> None:
        """Forget all that was read: the next tokens may stand anywhere."""
        self.stores = [self.empty(layer, scattered=True) for layer in self.layers]
        self.position = 0

    def entries(self, least: int, extra: Callable[[int], int] = lambda each: 0) -> int:
        """How many entries each head of each layer may hold at any moment: at least `least`, at most all.

        extra: further bytes over all layers when each head holds so many, for instance of an index. Raises
        BudgetTooSmall where fewer than `least` (or the whole prompt, if it is shorter) fit.
        """
        shapes = [self.shape(layer) for layer in self.compressible]
        form = DenseFormat(self.dtype)

        def nbytes(each: int) -> int:
            if each >= self.tokens:
                return self.full_nbytes
            counts = torch.tensor([[each] * shape.kv_heads for shape in shapes])
            return stored_nbytes(form, shapes, counts) + extra(each)

        least = min(least, self.tokens)
        if self.limit is None or not shapes or nbytes(self.tokens) <= self.room:
            return self.tokens
        if nbytes(least) > self.room:
            self.refuse(nbytes(least))
        return largest(lambda each: nbytes(each) <= self.room, least, self.tokens)

    @property
    def room(self) -> int:
        """The limit, without what exact layers take: what is left for those that may be compressed."""
        assert self.limit is not None
        return self.limit - self._fixed

    @property
    def scattered_nbytes(self) -> int:
        """What sliding layers hold besides at most while their positions do not follow one another."""
        exact = (layer for layer in self.layers if layer.index in self.exact)
        return sum(INDEX_BYTES * min(layer.window or 0, self.tokens) for layer in exact)

    @property
    def max_positions(self) -> int:
        """How many positions the model has."""
        return max_positions(self.model)

    @property
    def _fixed(self) -> int:
        exact = (layer for layer in self.layers if layer.index in self.exact)
        return sum(
            min(layer.window or self.tokens, self.tokens) * layer.kv_heads * self.shape(layer).entry_nbytes
            for layer in exact
        )

    def refuse(self, need: int) -> None:
        """Say that the caches would need `need` bytes besides those of exact layers. Raises BudgetTooSmall."""
        assert self.limit is not None
        full = self.full_nbytes + self._fixed
        smallest = math.ceil(min(need + self._fixed, full) / full * 1e4) / 1e4
        raise BudgetTooSmall(
            f"{self.label}: the budget {self.limit / full:.4g} does not hold what one piece of this prompt needs while "
            f"it is read; the smallest possible is {smallest:.4g}",
            smallest,
        )

    def pieces(self, most: int) -> Iterator[Tensor]:
        """The prompt in pieces [p] of at most `most` tokens; progress is reported and cancelling noticed."""
        for start in range(0, self.tokens, most):
            self.progress.update(f"reading for {self.label}", start, self.tokens)
            yield self.ids[start : start + most]
        self.progress.update(f"reading for {self.label}", self.tokens, self.tokens)

    def feed(
        self,
        ids: Tensor,
        watch: Watch | None = None,
        stores: Sequence[Store] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Let the model read ids [p] as the next tokens: they enter the stores. Returns its logits [v] after them.

        stores: instead of the reading's own. watch: sees what each layer read. positions: where the tokens stand, int64
        [p] ascending (see `begin_again`), by default from `position` on. Raises PromptTooLong beyond the model's
        positions, unless every store limits the distances that it attends at.
        """
        held = list(stores or self.stores)
        if any(store.reach is None for store in held):
            self.check_positions(self.position + ids.numel() if positions is None else int(positions[-1]) + 1)
        feeder = _Feeder(self.model, held, self.position, progress=self.progress, watch=watch)
        feeder.reserve(ids.numel())
        self.logits = feeder.feed(ids, positions=positions)[-1].cpu()
        self.position = feeder.position
        self.sample()
        return self.logits

    def feed_below(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Let only the layers below `layer` read ids [p] as the next tokens; their stores take them.

        Returns the queries [h, p, d] and keys [k, p, d] that this layer would attend with; there the pass stops.
        """
        self.check_positions(self.position + ids.numel())
        stopping = _Stopping(self.model, list(self.stores), self.position, progress=self.progress, last=layer)
        for store in self.stores[:layer]:
            store.reserve(ids.numel())
        seen = stopping.stop(ids)
        self.position += ids.numel()
        self.sample()
        return seen

    def read_only(self, where: Tensor, most: int, *, closed_up: bool = False) -> None:
        """Forget all that was read, and read only the tokens at `where` int64 [m] ascending, `most` at a time.

        closed_up: they stand one after another from position 0 on, instead of where they stand in the prompt.
        """
        self.begin_again()
        stand = torch.arange(where.numel()) if closed_up else where
        for piece, positions in zip(where.split(most), stand.split(most), strict=True):
            self.progress.update(f"reading again for {self.label}", int(piece[0]), self.tokens)
            self.feed(self.ids[piece], positions=positions)
        self.progress.update(f"reading again for {self.label}", self.tokens, self.tokens)

    def check_positions(self, end: int) -> None:
        """Raise PromptTooLong if the model does not have the positions before `end`."""
        if end > self.max_positions:
            raise PromptTooLong(
                f"{self.label} reads at true positions, up to {end:,} here, but the model has only "
                f"{self.max_positions:,}; shorten the text"
            )

    def look(self, ids: Tensor, score: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Let the model read ids [q] after what is held without keeping them.

        score: called at each compressible layer with its index and the attention that each entry gets from them,
        float32 [k, g, q, m] by slot, to make of it what is returned, one for each compressible layer.
        """
        looking = _Look(self, score)
        forward(self.model, looking, ids, torch.arange(self.position, self.position + ids.numel()))
        return [looking.found[layer.index] for layer in self.compressible]

    def keep(self, layer: int, slots: Tensor) -> None:
        """Keep of a layer's plain store only the entries at which slots bool [k, m] is True."""
        store = self.stores[layer]
        assert isinstance(store, DenseStore)
        if not bool(slots.all()):
            self.stores[layer] = _at(store, slots, self.dtype)

    def sample(self) -> None:
        """Note on the timeline what is alive now."""
        kv = kv_categories(self.stores)
        here = sum(nbytes for name, nbytes in kv.items() if self.device.type == "cpu" or not name.startswith(HOST))
        self.most_nbytes = max(
            self.most_nbytes, sum(nbytes for name, nbytes in kv.items() if not name.startswith(HOST))
        )
        self.timeline.add(
            "read",
            self.position,
            {"weights": self.weight_nbytes, **kv, "activations": max(self.live.peak - here, 0)},
            [store.nbytes for store in self.stores],
        )
        self.live.reset_peak()

    def held(self, *, tiers: Tensor | None = None, form: Format | None = None, notes: tuple[str, ...] = ()) -> Held:
        """What there is now, as the end of the reading."""
        return Held(self.stores, self.logits, self.position, form or DenseFormat(self.dtype), tiers, notes)


def _at(store: DenseStore, slots: Tensor, dtype: torch.dtype) -> DenseStore:
    """A store of the entries at slots [k, m] only."""
    held = store.contents(dtype)
    if held.valid is not None:
        slots = slots & held.valid
    return DenseStore.of(held.keys, held.values, held.positions, slots, dtype)


@dataclass
class _Feeder(Decoder):
    """A decoder that shows what each layer read."""

    watch: Watch | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        out = super().attend(layer, query, key, value, scale=scale, window=window, softcap=softcap)
        if self.watch is not None:
            self.watch(layer, query, key, value)
        return out


class _Stopped(Exception):
    """The forward pass has come to the last layer that is needed."""


@dataclass
class _Stopping(Decoder):
    """A decoder that leaves the model at layer `last`, before its attention."""

    last: int = 0
    seen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def stop(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The queries [h, p, d] and keys [k, p, d] of the last layer."""
        with suppress(_Stopped):
            self.feed(ids)
        assert self.seen is not None
        return self.seen

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if layer == self.last:
            self.seen = query, key
            raise _Stopped
        return super().attend(layer, query, key, value, scale=scale, window=window, softcap=softcap)


@dataclass
class _Look:
    """One pass over some tokens that attend to what is held and to each other, and leave nothing."""

    reading: Reading
    score: Callable[[int, Tensor], Tensor]
    found: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        reading, count = self.reading, key.shape[1]
        reading.progress.check()
        held = reading.stores[layer].contents(query.dtype)
        kv_heads, slots = held.keys.shape[:2]
        own = torch.arange(reading.position, reading.position + count, device=query.device)
        valid = None
        if held.valid is not None:
            valid = torch.cat([held.valid, held.valid.new_ones(kv_heads, count)], dim=1)
        positions = torch.cat([held.positions.expand(kv_heads, -1), own.expand(kv_heads, -1)], dim=1)
        scored = layer not in reading.exact
        out, weights = attend(
            query,
            torch.cat([held.keys, key], dim=1),
            torch.cat([held.values, value], dim=1),
            Scoring(scale, window, softcap),
            visible=seen_by(own, positions, valid, window),
            weights=scored,
        )
        if scored and weights is not None:
            self.found[layer] = self.score(layer, weights[..., :slots])
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
class Streamed:
    """A finished reading: what it left, and what it took."""

    held: Held
    timeline: Timeline
    seconds: float
    most_nbytes: int


def streamed(
    study: Study, method: KVMethod, dtype: torch.dtype, limit: int | None, question: Tensor | None
) -> Streamed:
    """The method's reading of the prompt within `limit` bytes; the last few are remembered with the trace.

    Raises what the method raises, and Cancelled, between layers.
    """
    trace, model = study.trace, study.reader(method.key)
    remembered: OrderedDict[object, Streamed] = trace.once(("streamed", method.parameter_key()), OrderedDict)
    asked = None if question is None or not method.asks else question
    key = (limit, dtype, None if asked is None else tuple(asked.tolist()))
    if key not in remembered:
        device = device_of(model)
        timeline, watch = Timeline("read"), Stopwatch(device)
        with watch("read"), live_bytes(device) as live:
            reading = Reading(
                model=model,
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
            held = method.read(reading)
            held = replace(held, notes=(*held.notes, *switch_notes(model, 0, trace.tokens)))
        remembered[key] = Streamed(held, timeline, watch.seconds["read"], reading.most_nbytes)
        while len(remembered) > _REMEMBERED:
            remembered.popitem(last=False)
    remembered.move_to_end(key)
    return remembered[key]
