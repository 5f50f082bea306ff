"""Decoding on stores: what happens at each layer when new tokens come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext
from workbench.engine.attention_hook import device_of, forward, latents
from workbench.engine.images import Images
from workbench.engine.states import States
from workbench.errors import BudgetTooSmall, NotApplicable
from workbench.kv.base import KVMethod
from workbench.kv.stores import ChunkStore, SharedStore, Store, cloned
from workbench.kv.stores.capabilities import Capturable, Evictable
from workbench.kv.stores.store import seen_by
from workbench.measure.memory import CudaBytes, LiveBytes, live_bytes, tensor_bytes
from workbench.models.facts import chunks
from workbench.progress import Progress
from workbench.runtime.continuing import fresh_states
from workbench.runtime.single_tokens import SingleToken, SingleTokens
from workbench.trace import LayerTrace
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Decoder:
    """One generation's state: a store for each layer, the position of the next token, and who leaves when room is
    needed.

    evicting: the method that evicts while decoding, or None; entries beyond the size that its stores begin with make
    others leave. attention: the method that attends in its own way while decoding, or None; it begins from `recorded`,
    the layers of the prompt's trace. outputs: where asked for, each layer's attention outputs [h, t, dv]. progress:
    asked at every layer whether to stop. by_store: layers whose stores attend in their own way, without `attention`.
    memory: what modules of a compressed model remember of the run, at first of its prompt; a copy of its own.
    notes: what a run has to say about how it was decoded. learnt: what `attention` learnt of the model. states: what
    layers that keep another state than keys and values remember of the text so far, at first of the prompt; a copy of
    its own. None: the model has no such layers, or begins to read. images: those of the prompt, which say where it is
    and what follows it is turned to.
    fusing: where `fuse` finds a way to read single tokens without the model's modules, `fused` once it has.
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
    learnt: dict[Any, Any] = field(default_factory=dict, repr=False)
    fusing: SingleTokens | None = field(default=None, repr=False)
    fused: SingleToken | None = field(init=False, default=None, repr=False)
    states: States | None = field(default=None, repr=False)
    images: Images | None = field(default=None, repr=False)
    by_store: tuple[int, ...] = field(init=False, default=())
    notes: list[str] = field(init=False, default_factory=list)
    _live: LiveBytes | CudaBytes | None = field(default=None, repr=False)
    _context: PassContext = field(init=False, repr=False)
    _positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False)
    _there: dict[torch.device, Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._context = PassContext(len(self.stores), self.position, state=dict(self.learnt))
        self.memory = dict(self.memory)
        if self.states is not None:
            self.states = self.states.clone()
        elif self.position == 0:
            self.states = fresh_states(self.model)
        self._causal, self._uncounted = 0, False
        self._chunks = {layer: chunk for layer, chunk in enumerate(chunks(self.model)) if chunk is not None}
        if self.attention is not None:
            self.by_store = tuple(i for i, store in enumerate(self.stores) if store.holder.attends_itself)
            for layer in self.recorded:
                self._context.layer = layer.index
                if self._attends(layer.index):
                    self.attention.begin(layer, self._context)
        leaving = (store.rescored or store.evictable for store in self.stores)
        holds = (lambda planned: planned) if self.evicting is None else self.evicting.holds
        self.capacity = [None if store is None else holds(store.longest) for store in leaving]

    def feed(self, ids: Tensor, *, logits: int = 1, measure: bool = False, positions: Tensor | None = None) -> Tensor:
        """Let the model read ids [q] as the next tokens; returns the last `logits` rows of logits [logits, v].

        With `measure` the live bytes of activations and workspace of this pass are recorded. positions: where the
        tokens stand, int64 [q] ascending, if not one after another from `position` on.
        """
        rows = []
        if positions is None:
            positions = torch.arange(self.position, self.position + ids.numel())
        sizes = self._parts(positions)
        for part, self._positions in zip(ids.split(sizes), positions.split(sizes), strict=True):
            self._there = {}
            self._begin_chunks(int(self._positions[0]))
            for store in self.stores:
                store.reads(part, self._positions)
            if measure:
                rows.append(self._measured(part, logits))
            elif self.fused is not None and part.numel() == 1 and (said := self._said()) is not None:
                rows.append(self.fused(self, part, said)[1 - min(logits, 1) :])
            else:
                rows.append(self._forward(part, logits))
            self.position = int(self._positions[-1]) + 1
        return torch.cat(rows)[-logits:]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if self.progress is not None:
            self.progress.check()
        store = self.stores[layer]
        positions = self._positions_on(key.device)
        if layer in self._chunks:  # of which a pass has one, and the store holds no other
            scoring = replace(scoring, window=None, chunk=None)
        if scoring.chosen is not None and (reason := self._chooses(layer)) is not None:
            raise NotApplicable(
                f"layer {layer}: an indexer of the model chooses what each token attends to, and so does {reason}; use "
                "a method that keeps or stores entries"
            )
        if store.holder.sliding_window is not None:
            scoring = replace(scoring, window=store.holder.sliding_window)
        before = self._enter()
        rescored = None if self.evicting is None else store.rescored
        evictable = None if self.evicting is None else store.evictable
        if rescored is not None:
            rescored.make_room(rescored.longest + key.shape[1] - (self.capacity[layer] or 0))
        elif evictable is not None:
            self._make_room(evictable, self.capacity[layer] or 0, key.shape[1])
        if store.holds_latents:
            rows = latents()
            assert rows is not None  # the prompt's layers had them
            store.append(rows.rotated, rows.latent, positions)
        else:
            store.append(key, value, positions)
        self._context.layer, self._context.positions = layer, positions
        self._causal += query.shape[0] * int((self._positions + 1).sum())
        weights = None
        by_method = self._attends(layer)
        if by_method:
            out = self._by_method(layer, query, positions, scoring)
        # Who evicts by attention needs all its weights, whatever else is computed.
        if evictable is not None or not by_method:
            counted = self._context.computed[layer]
            self._count_exact(store, query.shape[0], positions, scoring)
            exact = None
            if self.fused is not None and evictable is None and positions.numel() == 1:
                exact = self.fused.attend(store, query, scoring)
            if exact is None:
                exact, weights = store.attend(query, positions, scoring, weights=evictable is not None)
            if (selected := store.holder.scores_computed) is not None:
                self._context.computed[layer] = counted + selected
            out = out if by_method else exact
        if self.evicting is not None and evictable is not None and weights is not None:
            state = evictable.eviction_state
            weights = weights.view(len(state), -1, *weights.shape[2:])  # all heads may share what is held
            evictable.replace_state(self.evicting.update_state(state, weights))
        if self.outputs is not None:
            self.outputs[layer].append(out)
        self._leave(before)
        return out

    def _said(self) -> Tensor | None:
        """Where the token of this pass, which comes alone, is turned to, [1]; None within a prompt with images."""
        if self.images is None:
            return self._positions
        return self.images.turned_to(self._positions) if int(self._positions) >= self.images.tokens else None

    def _positions_on(self, device: torch.device) -> Tensor:
        """The positions of this pass on a device, which is not waited for where one token comes."""
        if device not in self._there:
            alone = self._positions.numel() == 1
            there = torch.full((1,), int(self._positions), device=device) if alone else self._positions.to(device)
            self._there[device] = there
        return self._there[device]

    def _by_method(self, layer: int, query: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """The attention method's output over what the layer's store holds."""
        assert self.attention is not None
        store = self.stores[layer]
        dense = store.contents(query.dtype)
        shape = (dense.keys.shape[0], query.shape[1], dense.keys.shape[1])
        seen = seen_by(positions, dense.positions, dense.valid, scoring)
        everything = torch.ones(1, dtype=torch.bool, device=query.device)
        visible = (everything if seen is None else seen).expand(shape)
        return self.attention.decode(query, dense, visible, scoring, self._context)

    def _chooses(self, layer: int) -> str | None:
        """Who but the model chooses what a layer's queries attend to; None: nobody."""
        store = self.stores[layer].holder
        if store.retrieves or store.selects:
            return f"its store ({type(store).__name__})"
        return self.attention.key if self.attention is not None and self._attends(layer) else None

    def _attends(self, layer: int) -> bool:
        """Whether the attention method attends at this layer, not the store."""
        holder = self.stores[layer].holder
        return self.attention is not None and holder.sliding_window is None and not holder.attends_itself

    def _count_exact(self, store: Store, heads: int, positions: Tensor, scoring: Scoring | None) -> None:
        """Count what `heads` query heads see at positions [q] of all that a store holds, these included; without a
        scoring each sees all that stands before it.
        """
        store = store.holder
        if store.retrieves:
            self._uncounted = True
            return
        if scoring is not None and (scoring.window is not None or scoring.chosen is not None):
            seen = seen_by(positions, *store.slots(), scoring)
            assert seen is not None
            self._context.count_seen(heads, seen.expand(store.kv_heads, -1, -1))
            return
        # Of t new tokens the last sees everything, the one before it one entry less.
        new, kv_heads = positions.numel(), store.kv_heads
        self._context.count(heads // kv_heads * (new * store.entries - kv_heads * (new * (new - 1) // 2)))

    @property
    def score_share(self) -> float | None:
        """Score entries computed since the prompt, of all causal ones; None where nothing was read, or where some were
        computed by a store that looks for what it needs and does not say how many.
        """
        return None if self._uncounted or not self._causal else sum(self._context.computed) / self._causal

    @property
    def attention_nbytes(self) -> int:
        """Bytes of what the attention method holds beside the stores."""
        return self._context.state_nbytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of the states that layers keep beside keys and values: the same under every recipe."""
        return 0 if self.states is None else self.states.nbytes

    @property
    def memory_nbytes(self) -> int:
        """Bytes of the tensors that modules of the model remember of this run."""
        remembered = (value if isinstance(value, tuple) else (value,) for value in self.memory.values())
        return tensor_bytes(tensor for values in remembered for tensor in values if tensor is not None)

    def advance(self, count: int, stores: Sequence[Capturable]) -> None:
        """Take up `count` tokens read one after another, each seeing all before, whose rows captured steps wrote into
        the layers' stores.
        """
        heads = self.model.config.get_text_config().num_attention_heads
        positions = torch.arange(self.position, self.position + count)
        for layer, (store, capturable) in enumerate(zip(self.stores, stores, strict=True)):
            self._context.layer, self._context.positions = layer, positions
            capturable.advance(positions)
            self._causal += heads * int((positions + 1).sum())
            counted = self._context.computed[layer]
            self._count_exact(store, heads, positions, None)
            if (selected := store.holder.scores_computed) is not None:
                self._context.computed[layer] = counted + selected
        self.position += count

    def stand(self, position: Tensor) -> None:
        """Let the next pass, of one token, find its position [1] on the device there, where it may change."""
        self._positions = torch.tensor([self.position])
        self._there = {position.device: position}

    @property
    def scores_computed(self) -> tuple[int, ...]:
        """Score entries that each layer computed since this decoder began or was copied."""
        return tuple(self._context.computed)

    def repeated(self, scores: Sequence[int]) -> None:
        """Take up a token that was read by replaying a step, in which layers compute so many scores."""
        heads = self.model.config.get_text_config().num_attention_heads
        self.position += 1
        self._causal += heads * len(self.stores) * self.position
        for layer, count in enumerate(scores):
            self._context.computed[layer] += count

    def clone(self) -> Decoder:
        """An independent continuation from here; it counts score entries anew."""
        stores = cloned(self.stores)
        twin = Decoder(self.model, stores, self.position, self.evicting, self.attention, states=self.states)
        twin.images = self.images
        twin._context = PassContext(len(stores), self._context.tokens, state=dict(self._context.state))
        twin.capacity = list(self.capacity)
        twin.activations, twin.workspace = self.activations, self.workspace
        twin.memory = dict(self.memory)
        twin.fusing = self.fusing
        return twin

    def fuse(self) -> str | None:
        """From here on read tokens that come alone without the model's modules; why not, where that cannot be done.

        The first time for a model its weights are read once, or graphs of its step captured.
        """
        if self.fusing is None:
            return "that was turned off"
        if self.states is not None:
            return "some layers keep another state than keys and values"
        try:
            self.fused = self.fusing.of(self.model)
        except NotApplicable as reason:
            return str(reason)
        return None

    @property
    def fused_nbytes(self) -> int:
        """Bytes held for reading tokens faster: weights again, or what passes between graphs."""
        return 0 if self.fused is None else self.fused.nbytes

    def reserve(self, tokens: int) -> None:
        """Allocate once for `tokens` more, where the stores will grow."""
        if self.evicting is None:
            for store in self.stores:
                store.reserve(tokens)

    def turns(self, steps: int) -> bool:
        """Whether a layer begins another chunk within so many tokens from here."""
        return any(
            (self.position - 1) // chunk != (self.position + steps - 1) // chunk for chunk in self._chunks.values()
        )

    def _parts(self, positions: Tensor) -> list[int]:
        """How many tokens go into each pass: as many as may enter together, and of no more than one chunk."""
        count = positions.numel()
        size = self._at_once(count)
        edges = {*range(0, count, size), count}
        for chunk in set(self._chunks.values()):
            edges |= {int(place) + 1 for place in (positions // chunk).diff().nonzero()}
        ordered = sorted(edges)
        return [after - before for before, after in pairwise(ordered)]

    def _begin_chunks(self, position: int) -> None:
        """Take from layers for which another chunk begins at this position what they hold, if their store does not let
        go of it by itself. What follows is held as the model computes.
        """
        begun = {layer for layer, chunk in self._chunks.items() if (self.position - 1) // chunk != position // chunk}
        fresh: dict[int, Store] = {}
        for layer in begun if self.position else ():
            store, chunk = self.stores[layer], self._chunks[layer]
            if store.holder is store and store.newest_chunk is None:
                held = store.contents(self.model.get_input_embeddings().weight.dtype)  # type: ignore[arg-type]
                fresh[id(store)] = ChunkStore(held.keys[:, :0].clone(), held.values[:, :0].clone(), position, chunk)
        if fresh:
            self.stores = [
                fresh.get(id(store), store) if store.holder is store else _reading(store, fresh)
                for store in self.stores
            ]

    def _at_once(self, count: int) -> int:
        """How many tokens may enter together: no more than half of what an evicting cache holds; one where the model
        forgets its state otherwise.
        """
        if self.states is not None and self.states.singly and self.states.begun and count > 1:
            note = f"{type(self.model).__name__} read on token by token: several at once would lose its layers' state"
            self.notes += [] if note in self.notes else [note]
            return 1
        if self.evicting is None or count <= 1:
            return max(count, 1)
        leaving = (store.rescored or store.evictable for store in self.stores)
        shortest = [store.shortest for store in leaving if store is not None]
        return min(count, max(min(shortest, default=count) // 2, 1))

    def _make_room(self, store: Evictable, capacity: int, count: int) -> None:
        """Let entries leave so that `count` more are no more than the capacity of a head."""
        assert self.evicting is not None
        room = store.longest + count - capacity
        if room <= 0:
            return
        if room > store.shortest:
            raise BudgetTooSmall("the cache is too small to take in a new token; use a larger budget", 0.0)
        state, (positions, valid) = store.eviction_state, store.slots()
        if valid is not None:  # slots beyond a head's length hold nothing and cannot leave
            empty = ~valid
            state = state.masked_fill(empty if state.ndim == 2 else empty[..., None], torch.inf)
            positions = positions.masked_fill(empty, -1)
        store.evict(self.evicting.evict(state, positions, room))

    def _forward(self, part: Tensor, logits: int) -> Tensor:
        count = min(logits, part.numel())
        return forward(self.model, self, part, self._positions, cache=self.states, logits=count, images=self.images)

    def _measured(self, part: Tensor, logits: int) -> Tensor:
        with live_bytes(device_of(self.model)) as live:
            self._live, self.activations, self.workspace = live, 0, 0
            try:
                return self._forward(part, logits)
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


def _reading(store: Store, fresh: Mapping[int, Store]) -> Store:
    """A layer's store that reads another's, or what has taken the place of that."""
    holder = fresh.get(id(store.holder))
    return store if holder is None else SharedStore(holder)
