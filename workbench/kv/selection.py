"""Deciding what stays: the largest selection of a recipe's methods whose predicted bytes meet the budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.core.bisection import largest_within
from workbench.errors import BadBudget, BadRecipe, BudgetTooSmall, NotRead
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.latents import expanded_by, rows_fit
from workbench.kv.plan import Plan, held_shape, rank, uncompressed_nbytes
from workbench.kv.ranking import Ranking, for_all_heads
from workbench.kv.rescoring import observing
from workbench.kv.stores.format import INDEX_BYTES, DenseFormat, Format, Shape, stored_nbytes
from workbench.kv.stores.latent import LatentFormat
from workbench.kv.stores.offload import OffloadFormat
from workbench.kv.stores.selected import SelectingFormat


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
    decided = decide(study, methods, stages, dtype, budget, partial(_ordered, study))
    tiers = torch.zeros(
        len(trace.layers), trace.kv_heads, trace.tokens, dtype=torch.uint8, device=trace.layers[0].device
    )
    for layer in trace.layers:
        if layer.index in trace.exact:
            tiers[layer.index, :, -layer.held :] = 1
    form, counts, ranking = decided.form, decided.counts, decided.ranking
    if counts is not None:
        if ranking is None or bool((counts == trace.tokens).all()):
            selected = torch.ones(*counts.shape, trace.tokens, dtype=torch.bool, device=tiers.device)
        else:
            selected = ranking.selected(counts.to(ranking.scores.device)).to(tiers.device)
        rest = 2 if form.keeps_rest else 0
        tiers[[layer.index for layer in trace.compressible]] = torch.where(selected, 1, rest).to(torch.uint8)
    nbytes, host, full = decided.nbytes, decided.host_nbytes, decided.full_nbytes
    return Plan(trace, tuple(methods), stages, form, tiers, dtype, nbytes, full, host, ranking, decided.expanded)


@dataclass(frozen=True)
class Decision:
    """How much of a prompt stays, and how it is stored.

    form: of the layers that may be compressed. counts: entries of each of their heads, or rows that these share, int64
    [l, k]; None: there is no such layer. ranking: the order by which entries are chosen; None: all stay. expanded: as
    in `Plan`. nbytes, host_nbytes: of all layers; full_nbytes: uncompressed.
    """

    form: Format
    counts: Tensor | None
    ranking: Ranking | None
    expanded: str | None
    nbytes: int
    host_nbytes: int
    full_nbytes: int


Ordering = Callable[[KVMethod, KVMethod, KVMethod | None, bool], "Ranked"]
"""From the method that scores, the one that allocates, the one that refines scores, and whether all heads keep the
same: the order of entries."""


def decide(
    study: Study,
    methods: Sequence[KVMethod],
    stages: Stages,
    dtype: torch.dtype,
    budget: Budget | None,
    ordering: Ordering,
) -> Decision:
    """How much stays of a prompt whose entries have this order; of layers only the shapes are looked at here.

    Raises BudgetTooSmall, BadBudget, BadRecipe as `plan_of` does.
    """
    trace = study.trace
    layers = trace.compressible
    full = uncompressed_nbytes(trace, dtype)
    expanded = expanded_by(stages, layers, dtype)
    rows = [held_shape(layer.rows, dtype) for layer in layers]
    shapes = rows if expanded is None else [held_shape(layer, dtype) for layer in layers]
    fixed = sum(held_shape(layer.rows, dtype).full_nbytes for layer in trace.layers if layer.index in trace.exact)
    label = " + ".join(method.key for method in methods)
    if not layers:
        limited = total_budget(methods, stages, budget)
        limit = None if limited is None else limited.nbytes(full)
        if limit is not None and fixed > limit:
            smallest = math.ceil(fixed / full * 1e4) / 1e4
            raise BudgetTooSmall(
                f"{label}: no layer here can be compressed further; the smallest budget is {smallest:.4g}", smallest
            )
        return Decision(DenseFormat(dtype), None, None, None, fixed, 0, full)

    fitting = partial(_fit, study, methods, stages, shapes, dtype, budget, full, fixed, ordering)
    if expanded is None:
        form, counts, ranking = fitting(label, latent=bool(layers[0].latents))
    else:
        # What keeps everything needs no keys and values of its own.
        kept: tuple[Format, Tensor, Ranking | None] | None = None
        if rows_fit(trace, stages, total_budget(methods, stages, budget), full):
            kept = DenseFormat(dtype), torch.full((len(layers), 1), trace.tokens), None
        elif _keeps_all(methods, stages, budget, trace.tokens, full):
            kept = fitting(label, whole=True)
        if kept is not None and bool((kept[1] == trace.tokens).all()):
            form, counts, ranking = LatentFormat(kept[0]), kept[1][:, :1], kept[2]
            shapes, expanded = rows, None
        else:
            why = f"{label} ({expanded}, which latent rows have to be expanded for)"
            form, counts, ranking = fitting(why, droppable=not _stores(stages))
    finished = _finished(form, counts, shapes)
    nbytes = fixed + stored_nbytes(finished, shapes, counts)
    host = stored_nbytes(finished, shapes, counts, host=True)
    return Decision(form, counts, ranking, expanded, nbytes, host, full)


def _ordered(
    study: Study, selecting: KVMethod, allocating: KVMethod, refining: KVMethod | None, shared: bool
) -> Ranked:
    """The order of a recording's entries."""
    importance = _importance(study, allocating, selecting)
    return Ranked(study, selecting, rank(study, selecting), importance, shared, refining)


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
    ordering: Ordering,
    label: str,
    *,
    latent: bool = False,
    whole: bool = False,
    droppable: bool = True,
) -> tuple[Format, Tensor, Ranking | None]:
    """The format, entries of each head [l, k] at the largest size that meets the budgets, and the order by which.

    latent: the shapes are those of latent rows. whole: whatever budgets say, all is selected that may be. droppable:
    keeping all exact takes no more than the uncompressed cache.
    """
    held: Callable[[Format], Format] = LatentFormat if latent else lambda form: form
    layers, kv_heads, tokens = len(shapes), shapes[0].kv_heads, shapes[0].tokens
    selecting = stages.score
    storing = stages.store
    observed = observing(study, stages, dtype)
    state = stages.evict.state_width if stages.evict else 0
    later = stages.evict is not None and stages.evict.leaves_prompt
    dense = observed(held(_attended(stages, study, dtype, shapes, DenseFormat(dtype, state, always=later))))
    limited = total_budget(methods, stages, budget)
    limit = None if limited is None else limited.nbytes(full)
    room = None if limit is None else limit - fixed
    everything = torch.full((layers, kv_heads), tokens)

    form = dense
    if selecting is None:
        if storing is not None:
            form = held(_stored(stages, study, dtype, shapes, room))
        if limited is not None and limited.kind == "tokens":
            raise BadBudget(f"{label} keeps every token: give its budget as a share or a size, not as {limited}")
        _check(stored_nbytes(form, shapes, everything), room, full, fixed, label, droppable=False)
        return form, everything, None

    if later:
        _check_whole(limited, tokens, label)
        return form, everything, None

    allocating = stages.allocate or selecting
    ranked = ordering(selecting, allocating, stages.refine, latent)
    # A method that selects and stores may let its budget decide the precision too.
    if storing is not None:
        form = held(_stored(stages, study, dtype, shapes, room if storing is selecting else None))
        _check_stored(form, storing, selecting, stages)
        form = observed(form)
    elif stages.retrieve is not None:
        form = OffloadFormat(dtype, stages.retrieve.retrieve(study, shapes))
    selected_budget = None if budget is not None else _selecting_budget(methods, stages)

    def measured(kind: Format) -> Callable[[int], int]:
        def nbytes(entries: int) -> int:
            counts = ranked.allocated(allocating, entries)
            return stored_nbytes(_finished(kind, counts, shapes), shapes, counts)

        return nbytes

    least, most = layers * kv_heads, layers * kv_heads * tokens
    # A storage method on top leaves the selection as it would be at the uncompressed precision.
    counted = dense if selected_budget is not None and storing is not None and stages.score is not storing else form
    entries = most
    if whole:
        pass
    elif selected_budget is not None and selected_budget.kind == "tokens":
        entries = min(layers * kv_heads * int(selected_budget.amount), most)
    else:
        target = room if selected_budget is None else (selected_budget.nbytes(full) or 0) - fixed
        if target is not None:
            nbytes = measured(counted)
            everything_nbytes = nbytes(most)
            if everything_nbytes > target:
                entries = largest_within(nbytes, target, least, most, everything_nbytes)
            _check(nbytes(entries), target, full, fixed, label, droppable=droppable)
        elif (wanted := ranked.wanted()) is not None:
            entries = min(max(wanted, least), most)
    if room is not None and not whole and counted is not form and storing is not None:
        # The store may choose its precision: for what was selected, whose positions it holds besides.
        chosen = [replace(shape, tokens=-(-entries // least)) for shape in shapes]
        beside = entries * INDEX_BYTES + sum(form.beside(shape) for shape in shapes)
        form = observed(held(_stored(stages, study, dtype, chosen, room - beside)))
        _check(measured(form)(entries), room, full, fixed, label, droppable=droppable)
    return form, ranked.allocated(allocating, entries), ranked.at(entries)


@dataclass
class Ranked:
    """The order of a method's scores, which may depend on how many entries stay; the last one is remembered.

    whole: that of every head's. shared: whether all heads keep the same entries. refining: what improves on the scores.
    """

    study: Study
    selecting: KVMethod
    whole: Ranking
    importance: Tensor | None
    shared: bool
    refining: KVMethod | None = None
    _last: tuple[int, Ranking] | None = None

    @cached_property
    def plain(self) -> Ranking:
        """However many stay."""
        if self.shared:
            return self._of(self.whole.scores)
        _ = self.whole.in_head  # by which all is selected: found before there are twins, which would each find it
        return self.whole.beside(self.importance)

    def _of(self, scores: Tensor) -> Ranking:
        return Ranking(for_all_heads(scores) if self.shared else scores).beside(self.importance)

    def at(self, entries: int) -> Ranking:
        """By which so many entries are chosen."""
        if self.refining is None and type(self.selecting).scores_at is KVMethod.scores_at:
            return self.plain
        if self._last is None or self._last[0] != entries:
            scores, share = self.whole.scores, entries / self.plain.scores.numel()
            found = self.selecting.scores_at(self.study, scores, share)
            if self.refining is not None:
                found = self.refining.refine(self.study, found, share)
            self._last = entries, self.plain if found is scores else self._of(found)
        return self._last[1]

    def wanted(self) -> int | None:
        """How many entries the scorer keeps where no budget says so; None: all."""
        return self.selecting.wanted(self.plain)

    def allocated(self, allocating: KVMethod, entries: int) -> Tensor:
        """How many of `entries` each head keeps, int64 [l, k]."""
        return allocating.allocate(self.at(entries), entries)


def _attended(stages: Stages, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], stored: Format) -> Format:
    """The format together with what queries select by, where they do."""
    return stored if stages.select is None else SelectingFormat(stored, stages.select.select(study, dtype, shapes))


def _stored(stages: Stages, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], room: int | None) -> Format:
    """The format of the recipe's storage method within `room` bytes, what queries select by included."""
    storing, selecting = stages.store, stages.select
    assert storing is not None
    if selecting is None:
        return storing.layout(study, dtype, shapes, room)
    selection = selecting.select(study, dtype, shapes)
    if room is not None:
        every = (torch.full((1, shape.kv_heads), shape.tokens) for shape in shapes)
        room -= sum(selection.nbytes(shape, held) for shape, held in zip(shapes, every, strict=True))
    form = storing.layout(study, dtype, shapes, room)
    if form.attends_itself:
        raise BadRecipe(
            f"{selecting.key} selects what is attended to, but the store of {storing.key} attends in its own way: use "
            "one of the two"
        )
    return SelectingFormat(form, selection)


def _check_whole(limited: Budget | None, tokens: int, label: str) -> None:
    """Raise BadBudget where a method that leaves the prompt whole has no budget for what comes."""
    if limited is None or limited.kind != "tokens":
        raise BadBudget(
            f"{label} leaves the prompt whole and evicts while decoding: give its budget as the tokens that each head "
            f'may hold then, for instance "{2 * tokens} tokens"'
        )
    if limited.amount < tokens:
        raise BadBudget(f"{label} leaves the prompt whole, whose {tokens} tokens are more than its budget of {limited}")


def _check_stored(form: Format, storing: KVMethod, selecting: KVMethod, stages: Stages) -> None:
    """Raise BadRecipe where other stages cannot do their work on what `storing` stores in this format."""
    if form.needs_all:
        raise BadRecipe(
            f"{storing.key} needs the same tokens of several layers, of which {selecting.key} drops some: use one of "
            "the two"
        )
    rescores = stages.evict is not None and stages.evict.rescores
    for other in (stages.merge, stages.evict if rescores else None):
        if other is not None and form.keeps_rest:
            raise BadRecipe(
                f"{storing.key} keeps at fewer bits what is not selected, so nothing is dropped that {other.key} could "
                "merge or choose; use one of the two"
            )
    if stages.place is not None and form.attends_itself:
        raise BadRecipe(
            f"{storing.key} attends to what it stores in its own way, where {stages.place.key} cannot close it up: use "
            f"{stages.place.key} with true positions"
        )
    if stages.evict is not None and rescores and form.droppable() is None:
        way = "use it with decode=False" if "decode" in type(stages.evict).model_fields else "leave it out"
        raise BadRecipe(
            f"{storing.key} stores entries together, so that none can leave by itself while decoding, as "
            f"{stages.evict.key} wants: {way}"
        )
    if stages.merge is not None and rescores and not form.rewritable:
        raise BadRecipe(
            f"{stages.merge.key} changes entries while decoding, where {storing.key} has rounded them already: use one "
            "of the two"
        )


def _finished(form: Format, counts: Tensor, shapes: Sequence[Shape]) -> Format:
    """A plan that keeps everything needs nothing to evict by."""
    return form.of_everything() if bool((counts == shapes[0].tokens).all()) else form


def _selecting_budget(methods: Sequence[KVMethod], stages: Stages) -> Budget | None:
    """The budget for what is selected: the scorer's, else the allocator's, else that of the only method."""
    if len(methods) == 1:
        return methods[0].effective_budget
    for method in (stages.score, stages.refine, stages.allocate, stages.evict):
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


def _stores(stages: Stages) -> bool:
    """Whether entries that stay are held in another way than as they are."""
    return any(stage is not None for stage in (stages.store, stages.retrieve, stages.select))


def _keeps_all(methods: Sequence[KVMethod], stages: Stages, budget: Budget | None, tokens: int, full: int) -> bool:
    """Whether the budgets of methods that only drop entries have room for all of them."""
    leaves = stages.evict is not None and stages.evict.leaves_prompt
    if stages.score is None or leaves or _stores(stages):
        return False
    limits = [total_budget(methods, stages, budget), None if budget is not None else _selecting_budget(methods, stages)]
    given = [limit for limit in limits if limit is not None]
    return bool(given) and all(
        limit.amount >= tokens if limit.kind == "tokens" else (limit.nbytes(full) or 0) >= full for limit in given
    )


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
