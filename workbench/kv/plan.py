"""From a trace and KV methods to a plan: for each layer and KV head, which positions stay, and at what precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.core.bisection import largest
from workbench.display import Shown
from workbench.errors import BadBudget, BadParameter, BadRecipe, BudgetTooSmall, NotApplicable, NotRead
from workbench.formatting import mib
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.ranking import Ranking
from workbench.kv.stores import SharedStore, SlidingStore, Store
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, stored_nbytes
from workbench.kv.stores.offload import OffloadFormat
from workbench.kv.stores.representable import check_reach
from workbench.measure.memory import Timeline
from workbench.measure.quality import output_error
from workbench.trace import LayerTrace, Trace

_PROBES = 64  # queries at the end of the prompt with which a plan's error is measured


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What KV methods decided on a trace.

    tiers: uint8 [l, k, n] over all layers: 0 dropped, otherwise 1 + index into `precisions`. nbytes: what the stores
    will hold on the device, host_nbytes: in host memory; full_nbytes: what the uncompressed cache would hold. exact:
    layers left alone, with the reason.
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
    def endless(self) -> bool:
        """Whether what follows may stand beyond the model's positions."""
        return False

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
            reasons.setdefault(reason, []).append(layer)
        return tuple(f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in reasons.items())

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
        """Whether entries are also evicted while decoding, so that the cache never outgrows the plan."""
        return self.stages.evict is not None and not self.keeps_all

    @cached_property
    def keeps_all(self) -> bool:
        """Whether no layer that could be compressed loses anything."""
        return all(bool((self.tiers[layer.index] == 1).all()) for layer in self.trace.compressible)

    @cached_property
    def counts(self) -> Tensor:
        """Positions kept by each layer and KV head, int64 [l, k]."""
        return (self.tiers > 0).sum(dim=-1)

    def kept(self, layer: int, kv_head: int) -> Tensor:
        """The positions that KV head keeps, ascending, int64 [m]. Raises BadParameter where there is no such head."""
        layers, heads, _ = self.tiers.shape
        if layer not in range(layers) or kv_head not in range(heads):
            raise BadParameter(
                f"layer {layer}, KV head {kv_head} does not exist: there are layers 0 to {layers - 1} with KV heads "
                f"0 to {heads - 1}"
            )
        return self.tiers[layer, kv_head].nonzero()[:, 0].cpu()

    def survival(self) -> Tensor:
        """The share of the KV heads of compressible layers that keep each position, float [n]."""
        layers = [layer.index for layer in self.trace.compressible] or list(range(len(self.trace.layers)))
        return (self.tiers[layers] > 0).float().mean(dim=(0, 1)).cpu()

    def stores(self) -> list[Store]:
        """Fresh stores, one a layer, holding exactly what was planned."""
        made: list[Store] = []
        for layer in self.trace.layers:
            made.append(self.store(layer) if layer.shared is None else SharedStore(made[layer.shared]))
        return made

    def store(self, layer: LayerTrace) -> Store:
        """A fresh store for one layer that holds keys and values of its own.

        Raises OutOfRange where its numbers are too large for the store's.
        """
        store = self._store(layer)
        check_reach(store, layer)
        return store

    def _store(self, layer: LayerTrace) -> Store:
        tiers = self.tiers[layer.index]
        merging = self.stages.merge
        if merging is not None and layer.index not in self.exact and not self.keeps_all:
            keys, values = merging.merge(layer, tiers > 0, self._scores(layer))
            layer = replace(layer, keys_held=keys, values_held=values)
        if layer.index in self.exact and layer.window is not None:
            return SlidingStore.of(layer.keys, layer.values, layer.window, self.dtype)
        if layer.index in self.exact:
            return DenseFormat(self.dtype).build(layer, tiers, None)
        if self.keeps_all:
            return self.format.of_everything().build(layer, tiers, None)
        state = None
        if self.evicts and self.stages.evict is not None:
            evicting = self.stages.evict
            state = self.trace.once(
                ("eviction state", evicting.parameter_key(), layer.index), lambda: evicting.eviction_state(layer)
            )
        return self.format.build(layer, tiers, state)

    def _scores(self, layer: LayerTrace) -> Tensor:
        """The scores [k, n] by which a layer was selected."""
        assert self.stages.score is not None  # without one nothing is dropped, and nothing merged
        ranking = rank(Study(self.trace), self.stages.score)  # found when planning
        return ranking.scores[[other.index for other in self.trace.compressible].index(layer.index)]

    @property
    def label(self) -> str:
        """The methods in short, as tables and legends name them."""
        return " + ".join(method.label() for method in self.methods)

    def __repr__(self) -> str:
        return f"<Plan of {self.label} for {self.trace.tokens:,} tokens: {self.share:.1%} of the cache>"

    def summary(self) -> str:
        """Bytes and kept positions in words."""
        fewest, most = int(self.counts.min()), int(self.counts.max())
        mean = float(self.counts.float().mean())
        kept = (
            f"{most:,} positions a head" if fewest == most else f"{mean:,.0f} positions a head ({fewest:,} to {most:,})"
        )
        lines = [
            f"Plan of {self.label} for {self.trace.tokens:,} tokens",
            f"  cache  {mib(self.nbytes)} of {mib(self.full_nbytes)} ({self.share:.1%})"
            + (f", {mib(self.host_nbytes)} more in host memory" if self.host_nbytes else ""),
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
            "kept": [int(kept) for kept in self.counts.sum(dim=1)],
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
            everything = torch.ones_like(self.tiers[layer.index])
            exact = DenseFormat(torch.float32).build(layer, everything, None)
            # What a sliding window has left behind is no loss: earlier queries saw it.
            complete = layer.index in self.exact
            held = DenseFormat(self.dtype).build(layer, everything, None) if complete else self.store(layer)
            got, _ = held.attend(probes, positions, layer.scoring)
            got = got.nan_to_num(0.0)
            want, _ = exact.attend(probes, positions, layer.scoring)
            rows.append(output_error(want, got))
        return torch.stack(rows).cpu()


def plan_of(study: Study, methods: Sequence[KVMethod], dtype: torch.dtype, budget: Budget | None = None) -> Plan:
    """Decide what stays of a recorded prompt under `methods`, counted in `dtype`; `budget`, if given, is for all of
    them together.

    Raises BudgetTooSmall, naming the smallest budget that works; BadRecipe for methods that contradict each other;
    NotRead where a method needs what was not recorded.
    """
    stages, trace = Stages.of(methods), study.trace
    if not trace.recorded and stages.read is None:
        raise NotRead(
            f"{' + '.join(method.key for method in methods)} needs a recording, but this prompt was taken in without "
            "one: call read(text) without record=False, or use a method that reads in bounded memory"
        )
    layers = trace.compressible
    shapes = [held_shape(layer, dtype) for layer in layers]
    full = uncompressed_nbytes(trace, dtype)
    fixed = sum(held_shape(layer, dtype).full_nbytes for layer in trace.layers if layer.index in trace.exact)
    label = " + ".join(method.key for method in methods)

    tiers = torch.zeros(
        len(trace.layers), trace.layers[0].kv_heads, trace.tokens, dtype=torch.uint8, device=trace.layers[0].device
    )
    for layer in trace.layers:
        if layer.index in trace.exact:
            tiers[layer.index, :, -(layer.window or trace.tokens) :] = 1
    if not layers:
        limited = total_budget(methods, stages, budget)
        limit = None if limited is None else limited.nbytes(full)
        if limit is not None and fixed > limit:
            smallest = math.ceil(fixed / full * 1e4) / 1e4
            raise BudgetTooSmall(
                f"{label}: no layer here can be compressed further; the smallest budget is {smallest:.4g}", smallest
            )
        return Plan(trace, tuple(methods), stages, DenseFormat(dtype), tiers, dtype, fixed, full)

    form, selected = _fit(study, methods, stages, shapes, dtype, budget, full, fixed, label)
    rest = 2 if form.keeps_rest else 0
    tiers[[layer.index for layer in layers]] = torch.where(selected, 1, rest).to(torch.uint8)
    counts = selected.sum(dim=-1)
    finished = _finished(form, counts, shapes)
    nbytes = fixed + stored_nbytes(finished, shapes, counts)
    host = stored_nbytes(finished, shapes, counts, host=True)
    return Plan(trace, tuple(methods), stages, form, tiers, dtype, nbytes, full, host)


def uncompressed_nbytes(trace: Trace, dtype: torch.dtype) -> int:
    """Bytes of the uncompressed cache of the whole prompt in `dtype`."""
    return sum(_plain_shape(layer, dtype).full_nbytes for layer in (*trace.layers, *trace.gone))


def _plain_shape(layer: LayerTrace, dtype: torch.dtype) -> Shape:
    """The size of a layer's uncompressed cache in `dtype`: what the plain model's own cache would hold.

    The model's own sliding window never holds more than itself; one that an attention method set is its saving, and so
    are heads that a weight method made narrower and layers that it took out.
    """
    shape = held_shape(layer, dtype)
    if layer.shared is not None:
        return shape
    keys, values = layer.plain_widths or (shape.key_width, shape.value_width)
    return replace(shape, tokens=layer.narrowed_from or shape.tokens, key_width=keys, value_width=values)


def held_shape(layer: LayerTrace, dtype: torch.dtype) -> Shape:
    """The size of what a layer can hold at most in `dtype`: its window, everything, or nothing that is another's."""
    tokens = layer.tokens if layer.window is None else min(layer.tokens, layer.window)
    if layer.shared is not None:
        tokens = 0
    return Shape(
        layer.kv_heads, tokens, layer.keys_held.shape[-1], layer.values_held.shape[-1], dtype.itemsize, layer.index
    )


def rank(study: Study, method: KVMethod) -> Ranking:
    """The scores of a method on the trace, in order; computed once for all budgets."""

    def compute() -> Ranking:
        scores = method.scores(study)
        if scores.isnan().any():
            raise NotApplicable(f"{method.key}: its scores are not numbers on this prompt")
        return Ranking(scores)

    return study.trace.once(("rank", method.parameter_key()), compute)


def _importance(study: Study, method: KVMethod, scorer: KVMethod) -> Tensor | None:
    """What a method allocates by, beside the scores of the recipe's scorer."""
    known = replace(study, ranking=rank(study, scorer))
    key = ("importance", method.parameter_key(), scorer.parameter_key())
    return study.trace.once(key, lambda: method.importance(known))


def _fit(
    study: Study,
    methods: Sequence[KVMethod],
    stages: Stages,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    budget: Budget | None,
    full: int,
    fixed: int,
    label: str,
) -> tuple[Format, Tensor]:
    """The format, and what is selected [l, k, n] at the largest size that meets the budgets."""
    layers, kv_heads, tokens = len(shapes), shapes[0].kv_heads, shapes[0].tokens
    selecting = stages.score
    storing = stages.store
    dense = DenseFormat(dtype, state=stages.evict.state_width if stages.evict else 0)
    limited = total_budget(methods, stages, budget)
    limit = None if limited is None else limited.nbytes(full)
    room = None if limit is None else limit - fixed
    everything = torch.ones(layers, kv_heads, tokens, dtype=torch.bool, device=study.trace.layers[0].device)

    form: Format = dense
    if selecting is None:
        if storing is not None:
            form = storing.layout(study, dtype, shapes, room)
        if limited is not None and limited.kind == "tokens":
            raise BadBudget(f"{label} keeps every token: give its budget as a share or a size, not as {limited}")
        _check(stored_nbytes(form, shapes, everything.sum(-1)), room, full, fixed, label, droppable=False)
        return form, everything

    allocating = stages.allocate or selecting
    ranking = rank(study, selecting).beside(_importance(study, allocating, selecting))
    # A method that selects and stores may let its budget decide the precision too.
    if storing is not None:
        form = storing.layout(study, dtype, shapes, room if storing is selecting else None)
    elif stages.retrieve is not None:
        form = OffloadFormat(dtype, stages.retrieve.retrieve(study, shapes))
    if form.keeps_rest and storing is not None and stages.merge is not None:
        raise BadRecipe(
            f"{storing.key} keeps at fewer bits what is not selected, so nothing is dropped that {stages.merge.key} "
            "could merge; use one of the two"
        )
    selected_budget = None if budget is not None else _selecting_budget(methods, stages)

    def selection(entries: int) -> Tensor:
        return ranking.selected(allocating.allocate(ranking, entries).to(everything.device))

    def measured(kind: Format) -> Callable[[int], int]:
        def nbytes(entries: int) -> int:
            counts = allocating.allocate(ranking, entries)
            return stored_nbytes(_finished(kind, counts, shapes), shapes, counts)

        return nbytes

    least, most = layers * kv_heads, layers * kv_heads * tokens
    # A storage method on top leaves the selection as it would be at the uncompressed precision.
    counted = dense if selected_budget is not None and storing is not None and stages.score is not storing else form
    entries = most
    if selected_budget is not None and selected_budget.kind == "tokens":
        entries = min(layers * kv_heads * int(selected_budget.amount), most)
    else:
        target = room if selected_budget is None else (selected_budget.nbytes(full) or 0) - fixed
        if target is not None:
            nbytes = measured(counted)
            entries = most if nbytes(most) <= target else largest(lambda count: nbytes(count) <= target, least, most)
            _check(nbytes(entries), target, full, fixed, label)
    if room is not None and counted is not form and storing is not None:
        # The store may choose its precision: for what was selected, whose positions it holds besides.
        chosen = [replace(shape, tokens=-(-entries // least)) for shape in shapes]
        form = storing.layout(study, dtype, chosen, room - entries * INDEX_BYTES)
        _check(measured(form)(entries), room, full, fixed, label)
    return form, selection(entries)


def _finished(form: Format, counts: Tensor, shapes: Sequence[Shape]) -> Format:
    """A plan that keeps everything needs nothing to evict by."""
    return form.of_everything() if bool((counts == shapes[0].tokens).all()) else form


def _selecting_budget(methods: Sequence[KVMethod], stages: Stages) -> Budget | None:
    """The budget for what is selected: the scorer's, else the allocator's, else that of the only method."""
    if len(methods) == 1:
        return methods[0].effective_budget
    for method in (stages.score, stages.allocate):
        if method is not None and method.budget is not None:
            return method.budget
    return stages.score.effective_budget if stages.score else None


def total_budget(methods: Sequence[KVMethod], stages: Stages, budget: Budget | None) -> Budget | None:
    """The budget of everything together, if anyone set one."""
    if budget is None and len(methods) == 1:
        return methods[0].effective_budget
    if budget is None and stages.store is not None:
        return stages.store.budget
    return budget


def _check(nbytes: int, room: int | None, full: int, fixed: int, label: str, *, droppable: bool = True) -> None:
    """Raise BudgetTooSmall unless nbytes is within the room; if `droppable`, keeping all exact is a choice too."""
    if room is None or nbytes <= room:
        return
    need = min(nbytes + fixed, full) if droppable else nbytes + fixed
    smallest = math.ceil(need / full * 1e4) / 1e4
    if int(smallest * full) < need:  # rounding in the division
        smallest = round(smallest + 1e-4, 4)
    if smallest > 1:
        raise BudgetTooSmall(
            f"{label}: on this prompt it takes {smallest:.4g} times the uncompressed cache, scales and zeros included; "
            "use larger groups, fewer bits or the full cache",
            smallest,
        )
    kept = f", {fixed / full:.0%} of it in layers that stay exact" if fixed else ""
    raise BudgetTooSmall(
        f"{label}: the budget {(room + fixed) / full:.4g} cannot be met on this prompt{kept}; the smallest possible is "
        f"{smallest:.4g}",
        smallest,
    )
