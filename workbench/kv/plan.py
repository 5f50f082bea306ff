"""From a trace and KV methods to a plan: for each layer and KV head, which positions stay, and at what precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.display import Shown
from workbench.engine.states import States
from workbench.errors import BadParameter, NotApplicable, NotRead
from workbench.formatting import mib
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.ranking import Ranking
from workbench.kv.stores import ChunkStore, ClosedUpStore, LatentStore, SharedStore, SlidingStore, Store
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.representable import check_reach
from workbench.measure.memory import Timeline
from workbench.measure.quality import output_error
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

_PROBES = 64  # queries at the end of the prompt with which a plan's error is measured


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What KV methods decided on a trace.

    tiers: uint8 [l, k, n] over all layers: 0 dropped, otherwise 1 + index into `precisions`; k as in those layers that
    may be compressed, whatever others have. nbytes: what the stores will hold on the device, host_nbytes: in host
    memory; full_nbytes: what the uncompressed cache would hold. ranking: the order by which entries were chosen. exact:
    layers left alone, with the reason. expanded: of layers whose cache holds latent rows (MLA), who needs the keys and
    values that are made of them, and why; None: the rows are held.
    """

    trace: Trace
    methods: tuple[KVMethod, ...]
    stages: Stages
    format: Format
    tiers: Tensor
    dtype: torch.dtype
    nbytes: int
    full_nbytes: int
    host_nbytes: int = 0
    ranking: Ranking | None = None
    expanded: str | None = None

    @property
    def timeline(self) -> Timeline:
        """Live bytes while the prompt was read."""
        return self.trace.timeline

    @property
    def read_seconds(self) -> float:
        """How long reading the prompt took."""
        return self.trace.read_seconds

    @property
    def logits(self) -> Tensor:
        """Those after the prompt, float32 [v]."""
        return self.trace.logits

    @property
    def position(self) -> int:
        """Where the next token stands."""
        return self.trace.tokens

    @property
    def states(self) -> States | None:
        """What layers that keep another state than keys and values remember; no part of the cache's share."""
        return self.trace.states

    @property
    def state_nbytes(self) -> int:
        """Bytes of those states: the same under every plan."""
        return 0 if self.states is None else self.states.nbytes

    @property
    def endless(self) -> bool:
        """Whether what follows may stand beyond the model's positions."""
        bounded = (layer.window is not None or layer.shared is not None for layer in self.trace.layers)
        return (
            self.evicts
            and not (self.stages.evict and self.stages.evict.grows)
            and self.closes_up
            and all(index not in self.exact or short for index, short in enumerate(bounded))
        )

    @property
    def closes_up(self) -> bool:
        """Whether entries stand by their place in the cache and not at their true positions."""
        return self.stages.place is not None and not self.keeps_all

    @property
    def chunked(self) -> bool:
        """Whether a method read the prompt by itself, in bounded memory, while the plan was made."""
        return False

    @property
    def exact(self) -> dict[int, str]:
        """Layers that stay exact, with the reason."""
        return self.trace.exact

    @property
    def notes(self) -> tuple[str, ...]:
        """Which layers stay exact and why, one line a reason."""
        reasons: dict[str, list[int]] = {}
        for layer, reason in self.exact.items():
            reasons.setdefault(reason, []).append(self.trace.layers[layer].called)
        notes = tuple(f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in reasons.items())
        return (*notes, *self._on_latents())

    def _on_latents(self) -> tuple[str, ...]:
        """What becomes of layers whose cache holds latent rows."""
        layers = [layer for layer in self.trace.compressible if layer.latents]
        if not layers:
            return ()
        named = f"layers {', '.join(str(layer.called) for layer in layers)}"
        if self.expanded is not None:
            one = layers[0].blank(1)
            times = held_shape(one, self.dtype).full_nbytes / held_shape(one.rows, self.dtype).full_nbytes
            note = (
                f"{named}: {self.expanded}, so keys and values are held here in place of the latent rows (MLA) that "
                f"they are made of: {times:.1f} times as many numbers a token"
            )
            return (note,)
        same = "" if self.ranking is None else "; all heads keep the same tokens, by the mean of their scores"
        return (f"{named}: latent rows (MLA) are held{same}",)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The names of the tiers: `tiers == 1` is stored as precisions[0]."""
        return self.format.tiers

    @property
    def share(self) -> float:
        """Bytes held on the device over uncompressed bytes."""
        return self.nbytes / self.full_nbytes

    @property
    def evicts(self) -> bool:
        """Whether entries leave while decoding; the cache then never outgrows the plan, unless its method `grows`."""
        if self.stages.evict is None:
            return False
        return not self.keeps_all or self.format.of_everything() == self.format  # which kept what evicting needs

    @cached_property
    def keeps_all(self) -> bool:
        """Whether no layer that could be compressed loses anything."""
        return all(bool((self.tiers[layer.index] == 1).all()) for layer in self.trace.compressible)

    @cached_property
    def counts(self) -> Tensor:
        """Positions kept by each layer and KV head, int64 [l, k]."""
        return (self.tiers > 0).sum(dim=-1)

    def kept(self, layer: int, kv_head: int) -> Tensor:
        """The positions that a KV head keeps in the layer that the model calls so, ascending, int64 [m].

        Raises BadParameter where there is no such head.
        """
        numbers = self.trace.numbers
        heads = self.trace.layers[numbers.index(layer)].kv_heads if layer in numbers else self.trace.kv_heads
        if layer not in numbers or kv_head not in range(heads):
            last = len(numbers) - 1
            there = f"0 to {last}" if numbers == tuple(range(last + 1)) else ", ".join(map(str, numbers))
            raise BadParameter(
                f"layer {layer}, KV head {kv_head} does not exist: there are layers {there} with KV heads 0 to "
                f"{heads - 1}"
            )
        return as_held(self.tiers[numbers.index(layer)], heads)[kv_head].nonzero()[:, 0].cpu()

    def survival(self) -> Tensor:
        """The share of the KV heads of compressible layers that keep each position, float [n]."""
        layers = [layer.index for layer in self.trace.compressible] or list(range(len(self.trace.layers)))
        return (self.tiers[layers] > 0).float().mean(dim=(0, 1)).cpu()

    def stores(self) -> list[Store]:
        """Fresh stores, one a layer, holding exactly what was planned."""
        made: dict[int, Store] = {}
        for layer in self.trace.layers:
            if layer.shared is not None:
                made[layer.index] = SharedStore(made[layer.shared])
            elif layer.index not in made:
                made |= self._together(layer) or {layer.index: self.store(layer)}
        return [made[layer.index] for layer in self.trace.layers]

    def store(self, layer: LayerTrace) -> Store:
        """A fresh store for one layer that holds keys and values of its own.

        Raises OutOfRange where its numbers are too large for the store's.
        """
        together = self._together(layer)
        if together:
            return together[layer.index]
        store = self._store(layer)
        check_reach(store, layer)
        return store

    def _together(self, layer: LayerTrace) -> dict[int, Store]:
        """The stores, by layer, of several that hold something in common with this one; none where it is alone."""
        group = self.format.layers_with(layer.index)
        if len(group) == 1 or layer.index in self.exact:
            return {}
        layers = [self.trace.layers[index] for index in group]
        made = self.format.build_together(layers, [self._tiers(layer) for layer in layers])
        for store, held in zip(made, layers, strict=True):
            check_reach(store, held)
        return dict(zip(group, made, strict=True))

    def _tiers(self, layer: LayerTrace) -> Tensor:
        """What becomes of a layer's entries [k, n], where the layer lies."""
        return self.tiers[layer.index].to(layer.device)

    def _store(self, layer: LayerTrace) -> Store:
        tiers = as_held(self._tiers(layer), layer.kv_heads)
        if layer.index in self.exact:
            rows = self._exact(layer.rows, tiers)
            return rows if layer.latents is None else LatentStore(rows, layer.latents.expansion, layer.heads)
        merging = self.stages.merge
        if merging is not None and not self.keeps_all:
            keys, values = merging.merge(layer, tiers > 0, self._scores(layer))
            layer = replace(layer, keys_held=keys, values_held=values)
        if self.keeps_all and not self.evicts:
            return self.format.of_everything().build(layer, tiers, None)
        state = None
        if self.evicts and self.stages.evict is not None and not self.stages.evict.rescores:
            evicting, absorbs = self.stages.evict, layer.latents is not None and self.expanded is None
            state = self.trace.once(
                ("eviction state", evicting.parameter_key(), layer.index, absorbs),
                lambda: evicting.eviction_state(layer.absorbed if absorbs else layer),
            )
        store = self.format.build(layer, tiers, state)
        if not self.closes_up:
            return store
        evict = self.stages.evict if self.evicts else None
        return ClosedUpStore(store, layer.rotation, together=evict is None or evict.evicts_by_position)

    def _exact(self, layer: LayerTrace, tiers: Tensor) -> Store:
        """The store of a layer that is left alone."""
        if layer.chunk is not None:
            keys, values = (x[:, -layer.held :].to(self.dtype, copy=True) for x in (layer.keys, layer.values))
            return ChunkStore(keys, values, layer.tokens, layer.chunk)
        if layer.window is not None:
            return SlidingStore.of(layer.keys, layer.values, layer.window, self.dtype)
        return DenseFormat(self.dtype).build(layer, tiers[: layer.keys_held.shape[0]], None)

    def _scores(self, layer: LayerTrace) -> Tensor:
        """The scores [k, n] by which a layer was selected."""
        assert self.ranking is not None  # without one nothing is dropped, and nothing merged
        scores = self.ranking.scores[[other.index for other in self.trace.compressible].index(layer.index)]
        return scores.to(layer.device)

    @property
    def label(self) -> str:
        """The methods in short, as tables and legends name them."""
        return " + ".join(method.label() for method in self.methods)

    def __repr__(self) -> str:
        return f"<Plan of {self.label} for {self.trace.tokens:,} tokens: {self.share:.1%} of the cache>"

    def summary(self) -> str:
        """Bytes and kept positions in words."""
        state = self.state_nbytes
        fewest, most = int(self.counts.min()), int(self.counts.max())
        mean = float(self.counts.float().mean())
        kept = (
            f"{most:,} positions a head" if fewest == most else f"{mean:,.0f} positions a head ({fewest:,} to {most:,})"
        )
        lines = [
            f"Plan of {self.label} for {self.trace.tokens:,} tokens",
            f"  cache  {mib(self.nbytes)} of {mib(self.full_nbytes)} ({self.share:.1%})"
            + (f", {mib(self.host_nbytes)} more in host memory" if self.host_nbytes else ""),
            *([f"  rows   {kind} numbers a token"] if self.expanded is None and (kind := self.trace.latent) else []),
            *([f"  state  {mib(state)} beside keys and values, the same under every plan"] if state else []),
            f"  kept   {kept}",
        ]
        if len(self.precisions) > 1:
            shares = [
                f"{name} {(self.tiers == tier).float().mean():.1%}" for tier, name in enumerate(self.precisions, 1)
            ]
            lines.append(f"  tiers  {', '.join(shares)}")
        if self.exact:
            lines.append(f"  exact  {len(self.exact)} layers: {'; '.join(sorted(set(self.exact.values())))}")
        return "\n".join(lines)

    def numbers(self) -> dict[str, Any]:
        """Bytes and kept positions, JSON-able."""
        return {
            "methods": [method.to_dict() for method in self.methods],
            "tokens": self.trace.tokens,
            "nbytes": self.nbytes,
            "full_nbytes": self.full_nbytes,
            "host_nbytes": self.host_nbytes,
            "state_nbytes": self.state_nbytes,
            "kept": [
                int(as_held(counts[:, None], layer.kv_heads).sum())
                for counts, layer in zip(self.counts, self.trace.layers, strict=True)
            ],
        }

    @cached_property
    def error(self) -> Tensor:
        """Relative error of each head's attention output, float32 [l, h], for the prompt's last queries (at most 64).

        ||compressed - exact|| / ||exact|| over those queries, both at float32; what eviction and rounding cost before
        any of it spreads through the model. A query that can see nothing of what is kept counts as giving zeros.
        """
        if not self.trace.recorded:
            raise NotRead("the error of heads is measured on a recording, but this prompt was taken in without one")
        rows = []
        for layer in self.trace.layers:
            probes = layer.queries[:, -_PROBES:].float()
            positions = torch.arange(layer.tokens - probes.shape[1], layer.tokens, device=probes.device)
            everything = torch.ones_like(as_held(self._tiers(layer), layer.kv_heads))
            exact = DenseFormat(torch.float32).build(layer, everything, None)
            # What a sliding window has left behind is no loss: earlier queries saw it.
            complete = layer.index in self.exact
            store = DenseFormat(self.dtype).build(layer, everything, None) if complete else self.store(layer)
            got = _attended(store, probes, positions, layer.scoring).nan_to_num(0.0)
            want, _ = exact.attend(probes, positions, layer.scoring)
            rows.append(output_error(want, got))
        return stacked(rows).cpu()


def as_held(tiers: Tensor, heads: int) -> Tensor:
    """A layer's tiers [k, n] for as many KV heads. One that has more or fewer than those that may be compressed stays
    exact, and all its heads hold the same.
    """
    return tiers if len(tiers) == heads else tiers[:1].expand(heads, -1)


def _attended(store: Store, queries: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
    """What queries [h, q, d] at positions [q] get, [h, q, dv]: each alone, where that is how a store selects."""
    at_once = 1 if store.selects else len(positions)
    parts = zip(queries.split(at_once, dim=1), positions.split(at_once), strict=True)
    return torch.cat([store.attend(part, at, scoring)[0] for part, at in parts], dim=1)


def uncompressed_nbytes(trace: Trace, dtype: torch.dtype) -> int:
    """Bytes of the uncompressed cache of the whole prompt in `dtype`."""
    return sum(_plain_shape(layer, dtype).full_nbytes for layer in (*trace.layers, *trace.gone))


def _plain_shape(layer: LayerTrace, dtype: torch.dtype) -> Shape:
    """The size of a layer's uncompressed cache in `dtype`: what the plain model's own cache would hold.

    The model's own sliding window never holds more than itself; one that an attention method set is its saving, and so
    are heads that a weight method made narrower and layers that it took out.
    """
    shape = held_shape(layer.rows, dtype)
    if layer.shared is not None:
        return shape
    keys, values = (None if layer.latents else layer.plain_widths) or (shape.key_width, shape.value_width)
    return replace(shape, tokens=layer.narrowed_from or shape.tokens, key_width=keys, value_width=values)


def held_shape(layer: LayerTrace, dtype: torch.dtype) -> Shape:
    """The size of what a layer can hold at most in `dtype`: its window, chunk or everything; nothing of another's. Of
    `layer.rows` for one whose latent rows are held.
    """
    tokens = layer.held if layer.shared is None else 0
    widths = layer.keys_held.shape[-1], layer.values_held.shape[-1]
    return Shape(layer.kv_heads, tokens, *widths, dtype.itemsize, layer.index, layer.image_span)


def rank(study: Study, method: KVMethod) -> Ranking:
    """The scores of a method on the trace, in order; computed once for all budgets."""

    def compute() -> Ranking:
        scores = method.scores(study)
        if scores.isnan().any():
            raise NotApplicable(f"{method.key}: its scores are not numbers on this prompt")
        return Ranking(scores)

    return study.trace.once(("rank", method.parameter_key()), compute)
