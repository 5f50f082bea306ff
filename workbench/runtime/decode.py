"""Decoding on stores: what happens at each layer when new tokens come in, and the loop that makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, Pass
from workbench.engine.attention_hook import device_of, forward
from workbench.errors import BudgetTooSmall, NotApplicable, OutOfRange
from workbench.kv.base import KVMethod
from workbench.kv.stores import DenseStore, SlidingStore, Store, cloned
from workbench.kv.stores.mixed import MixedStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.paged import PagedStore
from workbench.kv.stores.store import seen_by
from workbench.kv.stores.tiered import TieredStore
from workbench.measure.memory import CudaBytes, LiveBytes, live_bytes, tensor_bytes
from workbench.progress import Progress
from workbench.runtime import cuda_graph
from workbench.trace import LayerTrace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FINDING = (TieredStore, PagedStore)  # stores that look for what a query needs: how many scores they compute is theirs
_OWN = (*_FINDING, MixedStore)  # with those that move entries by what they got: no attention but their own will do


@dataclass
class Decoder:
    """One generation's state: a store for each layer, the position of the next token, and who leaves when room is
    needed.

    evicting: the method that evicts while decoding, or None; entries beyond the size that its stores begin with make
    others leave. attention: the method that attends in its own way while decoding, or None; it begins from `recorded`,
    the layers of the prompt's trace. outputs: where asked for, each layer's attention outputs [h, t, dv]. progress:
    asked at every layer whether to stop. finding: layers whose stores attend in their own way, without `attention`.
    memory: what modules of a compressed model remember of the run, at first of its prompt; a copy of its own.
    notes: what a run has to say about how it was decoded.
    """

    model: PreTrainedModel
    stores: list[Store]
    position: int
    evicting: KVMethod | None = None
    attention: AttentionMethod | None = None
    recorded: Sequence[LayerTrace] = field(default=(), repr=False)
    outputs: list[list[Tensor]] | None = None
    progress: Progress | None = None
    activations: int = 0
    workspace: int = 0
    memory: dict[Any, Any] = field(default_factory=dict, repr=False)
    finding: tuple[int, ...] = field(init=False, default=())
    notes: list[str] = field(init=False, default_factory=list)
    _live: LiveBytes | CudaBytes | None = field(default=None, repr=False)
    _at: Pass = field(init=False, repr=False)
    _positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False)

    def __post_init__(self) -> None:
        self._at = Pass(len(self.stores), self.position)
        self.memory = dict(self.memory)
        self._causal, self._uncounted = 0, False
        self._held: list[int | None] = [None] * len(self.stores)
        self._widths = [0] * len(self.stores)
        if self.attention is not None:
            self.finding = tuple(i for i, store in enumerate(self.stores) if isinstance(store.holder, _OWN))
            for layer in self.recorded:
                self._at.layer = layer.index
                if self._attends(layer.index):
                    self.attention.begin(layer, self._at)
        self.capacity = [store.longest if isinstance(store, DenseStore) else None for store in self.stores]

    def feed(self, ids: Tensor, *, logits: int = 1, measure: bool = False, positions: Tensor | None = None) -> Tensor:
        """Let the model read ids [q] as the next tokens; returns the last `logits` rows of logits [logits, v].

        With `measure` the live bytes of activations and workspace of this pass are recorded. positions: where the
        tokens stand, int64 [q] ascending, if not one after another from `position` on.
        """
        rows = []
        if positions is None:
            positions = torch.arange(self.position, self.position + ids.numel())
        size = self._at_once(ids.numel())
        for part, self._positions in zip(ids.split(size), positions.split(size), strict=True):
            if measure:
                rows.append(self._measured(part, logits))
            else:
                rows.append(forward(self.model, self, part, self._positions, logits=min(logits, part.numel())))
            self.position = int(self._positions[-1]) + 1
        return torch.cat(rows)[-logits:]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if self.progress is not None:
            self.progress.check()
        store = self.stores[layer]
        positions = self._positions.to(key.device)
        if isinstance(store.holder, SlidingStore):  # the window that the prompt was read with, a method's or its own
            scoring = replace(scoring, window=store.holder.window)
        before = self._enter()
        watching = self.evicting is not None and isinstance(store, DenseStore) and store.mass is not None
        if watching:
            self._make_room(layer, key.shape[1])
        store.append(key, value, positions)
        self._at.layer, self._at.positions = layer, positions
        self._causal += query.shape[0] * int((self._positions + 1).sum())
        weights = None
        own = self._attends(layer)
        if own:
            out = self._own_way(layer, query, positions, scoring)
        if watching or not own:  # who evicts by attention needs all its weights, whatever else is computed
            self._count_exact(store, query.shape[0], positions, scoring.window)
            exact, weights = store.attend(query, positions, scoring, weights=watching)
            out = out if own else exact
        if watching and weights is not None and isinstance(store, DenseStore) and store.mass is not None:
            assert self.evicting is not None and store.remembered is not None
            store.remember(self.evicting.watch(store.remembered, weights))
        if self.outputs is not None:
            self.outputs[layer].append(out)
        self._leave(before)
        return out

    def _own_way(self, layer: int, query: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """The attention method's output over what the layer's store holds."""
        assert self.attention is not None
        store = self.stores[layer]
        held = store.contents(query.dtype)
        shape = (held.keys.shape[0], query.shape[1], held.keys.shape[1])
        seen = seen_by(positions, held.positions, held.valid, scoring.window)
        everything = torch.ones(1, dtype=torch.bool, device=query.device)
        visible = (everything if seen is None else seen).expand(shape)
        return self.attention.decode(query, held, visible, scoring, at=self._at)

    def _attends(self, layer: int) -> bool:
        """Whether the attention method attends at this layer, not the store."""
        return self.attention is not None and not isinstance(self.stores[layer].holder, (SlidingStore, *_OWN))

    def _count_exact(self, store: Store, heads: int, positions: Tensor, window: int | None) -> None:
        """Count what `heads` query heads see at positions [q] of all that a store holds, these included."""
        store = store.holder
        if isinstance(store, _FINDING):
            self._uncounted = True
            return
        layer, new = self._at.layer, positions.numel()
        if window is not None:
            held = store.contents(torch.float32)
            seen = seen_by(positions, held.positions, held.valid, window)
            assert seen is not None
            self._at.count_seen(heads, seen.expand(len(held.keys), -1, -1))
            return
        if isinstance(store, DenseStore):
            kv_heads, total = store.keys.heads, store.keys.total
        else:  # nothing leaves these: what was held at first and what came since
            before = self._held[layer]
            rows = store.positions if before is None else []
            total = sum(len(row) for row in rows) if before is None else before + self._widths[layer] * new
            self._widths[layer] = kv_heads = len(rows) or self._widths[layer]
            self._held[layer] = total
        # Of t new tokens the last sees everything, the one before it one entry less.
        self._at.count(heads // kv_heads * (new * total - kv_heads * (new * (new - 1) // 2)))

    @property
    def score_share(self) -> float | None:
        """Score entries computed since the prompt, of all causal ones; None where nothing was read, or where some were
        computed by a store that looks for what it needs and does not say how many.
        """
        return None if self._uncounted or not self._causal else sum(self._at.computed) / self._causal

    @property
    def attention_nbytes(self) -> int:
        """Bytes of what the attention method holds beside the stores."""
        return self._at.left_nbytes

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the tensors that modules of the model remember of this run."""
        held = (value if isinstance(value, tuple) else (value,) for value in self.memory.values())
        return tensor_bytes(tensor for values in held for tensor in values if tensor is not None)

    def take_up(self, count: int) -> None:
        """Count `count` tokens read one after another, each seeing all before, whose rows others have written."""
        heads = self.model.config.get_text_config().num_attention_heads
        positions = torch.arange(self.position, self.position + count)
        for layer, store in enumerate(self.stores):
            assert isinstance(store, DenseStore | PackedStore)
            held = store.keys.data if isinstance(store, DenseStore) else store.key_tail.data
            self._at.layer, self._at.positions = layer, positions
            store.take_up(positions.to(held.device))
            self._causal += heads * int((positions + 1).sum())
            self._count_exact(store, heads, positions, None)
        self.position += count

    def clone(self) -> Decoder:
        """An independent continuation from here; it counts score entries anew."""
        stores = cloned(self.stores)
        twin = Decoder(self.model, stores, self.position, self.evicting, self.attention)
        twin._at = Pass(len(stores), self._at.tokens, left=dict(self._at.left))
        twin._held, twin._widths = list(self._held), list(self._widths)
        twin.capacity = list(self.capacity)
        twin.activations, twin.workspace = self.activations, self.workspace
        twin.memory = dict(self.memory)
        return twin

    def reserve(self, tokens: int) -> None:
        """Allocate once for `tokens` more, where the stores will grow."""
        if self.evicting is None:
            for store in self.stores:
                store.reserve(tokens)

    def _at_once(self, count: int) -> int:
        """How many tokens may enter together: no more than half of what an evicting cache holds."""
        if self.evicting is None or count <= 1:
            return max(count, 1)
        held = [int(s.keys.counts.min()) for s in self.stores if isinstance(s, DenseStore) and s.mass is not None]
        return min(count, max(min(held, default=count) // 2, 1))

    def _make_room(self, layer: int, count: int) -> None:
        store, capacity = self.stores[layer], self.capacity[layer]
        assert isinstance(store, DenseStore) and store.remembered is not None and self.evicting is not None
        room = store.longest + count - (capacity or 0)
        if room <= 0:
            return
        if room > int(store.keys.counts.min()):
            raise BudgetTooSmall("the cache is too small to take in a new token; use a larger budget", 0.0)
        mass, positions = store.remembered, store.slot_positions
        valid = store.keys.valid()
        if valid is not None:  # slots beyond a head's length hold nothing and cannot leave
            empty = ~valid
            mass = mass.masked_fill(empty if mass.ndim == 2 else empty[..., None], torch.inf)
            positions = positions.masked_fill(empty, -1)
        store.evict(self.evicting.evict(mass, positions, room))

    def _measured(self, part: Tensor, logits: int) -> Tensor:
        with live_bytes(device_of(self.model)) as live:
            self._live, self.activations, self.workspace = live, 0, 0
            try:
                return forward(self.model, self, part, self._positions, logits=min(logits, part.numel()))
            finally:
                self.activations = max(self.activations, live.peak)
                self._live = None

    def _enter(self) -> int:
        if self._live is None:
            return 0
        self.activations = max(self.activations, self._live.peak)
        self._live.reset_peak()
        return self._live.current

    def _leave(self, before: int) -> None:
        if self._live is not None:
            self.workspace = max(self.workspace, self._live.peak - before)
            self._live.reset_peak()


def greedy(
    decoder: Decoder, ids: Tensor, logits: Tensor, *, max_new_tokens: int, eos: Sequence[int], graphs: bool = False
) -> Iterator[int]:
    """Read ids [q] and yield the most likely tokens one by one, up to and including one that ends the answer.

    logits [v]: those before ids, for when there is nothing to read first. The last token yielded has not been read.
    graphs: on a CUDA device, capture a step and replay it, where the stores allow it and the answer is long enough.
    Reports to the decoder's progress.
    """
    progress = decoder.progress or Progress()
    if ids.numel():
        progress.update("question", 0, 1)
        logits = decoder.feed(ids, measure=True)[-1]
        progress.update("question", 1, 1)
    for step in range(max_new_tokens):
        if not bool(logits.max().isfinite()):  # what was appended on a GPU is not checked token by token
            raise OutOfRange(
                f"after {step} tokens the logits are not finite numbers: what the model computes, or its keys and "
                'values in this cache, may be too large for their precision; try kv_dtype="bfloat16", or another method'
            )
        token = int(logits.argmax())
        yield token
        progress.update("decoding", step + 1, max_new_tokens)
        if token in eos or step == max_new_tokens - 1:
            return
        left = max_new_tokens - step - 1
        if graphs and step == 1 and left >= cuda_graph.WORTH and device_of(decoder.model).type == "cuda":
            try:  # the first token has been read as all are without a graph, and was measured
                following = cuda_graph.captured(decoder, token, left)
            except NotApplicable as reason:
                decoder.notes.append(f"decoded without a CUDA graph: {reason}")
            else:
                decoder.notes += [note] if (note := cuda_graph.note(decoder)) else []
                for more, token in enumerate(following.answer(eos), step + 2):
                    yield token
                    progress.update("decoding", more, max_new_tokens)
                return
        logits = decoder.feed(torch.tensor([token]), measure=step == 0)[-1]
