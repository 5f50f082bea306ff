"""Making a plan: from what was recorded, or by a method that reads the prompt by itself in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.core.across_devices import stacked
from workbench.core.memo import Memo
from workbench.engine.states import States
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.latents import expanded_by, rows_fit
from workbench.kv.plan import Plan, as_held, uncompressed_nbytes
from workbench.kv.read_and_stored import notes_on, read_and_stored
from workbench.kv.selection import plan_of, total_budget
from workbench.kv.stores import Store, cloned
from workbench.measure.memory import Timeline
from workbench.models.rotary import switch
from workbench.progress import Progress
from workbench.runtime.chunked_prefill import FinishedPrefill, chunked_prefill
from workbench.runtime.continuing import states_after
from workbench.runtime.decode import Decoder
from workbench.trace import LayerTrace, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, repr=False, kw_only=True)
class ChunkedPlan(Plan):
    """A plan that came about while a method read the prompt by itself; its stores are copies of what that left."""

    prefill: FinishedPrefill

    @property
    def timeline(self) -> Timeline:
        return self.prefill.timeline

    @property
    def read_seconds(self) -> float:
        return self.prefill.seconds

    @property
    def logits(self) -> Tensor:
        return self.prefill.result.logits

    @property
    def position(self) -> int:
        return self.prefill.result.position

    @property
    def states(self) -> States | None:
        return self.prefill.states

    @property
    def endless(self) -> bool:
        return all(store.reach is not None for store in self.prefill.result.stores)

    @property
    def chunked(self) -> bool:
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *self.prefill.result.notes)

    def store(self, layer: LayerTrace) -> Store:
        return self.prefill.result.stores[layer.index].clone()


def study_of(
    trace: Trace, model: PreTrainedModel | None = None, progress: Progress | None = None, measured: Memo | None = None
) -> Study:
    """What methods may look at: the trace, and the model that read it, which reads on from stores that they make.

    measured: what was measured of the model for earlier studies, whatever it read.
    """
    progress = progress or Progress()
    if model is None:
        return Study(trace, progress=progress)

    def forcing(stores: list[Store], position: int, ids: Tensor) -> Tensor:
        states, images = trace.states, trace.prompt.images
        if position != trace.tokens:
            states = trace.once(("states at", position), lambda: states_after(model, trace.ids[:position], images))
        decoder = Decoder(model, stores, position, progress=progress, memory=trace.memory, states=states)
        decoder.images = images
        return decoder.feed(ids, logits=ids.numel())

    return Study(trace, model, progress, forcing=forcing, measured=measured)


def make_plan(
    trace: Trace,
    methods: Sequence[KVMethod],
    dtype: torch.dtype,
    budget: Budget | None = None,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
    question: Tensor | None = None,
    measured: Memo | None = None,
) -> Plan:
    """Decide what stays under `methods`, counted in `dtype`; `budget`, if given, is for all of them together.

    model: the one that read the trace, for methods that let it read again. question: ids [q] that will be asked, for
    methods that read for a question. measured: what was measured of the model for earlier plans, whatever it read.

    Raises BudgetTooSmall, naming the smallest budget that works; BadRecipe for methods that contradict each other;
    NotRead where a method needs what was not recorded.
    """
    stages, study = Stages.of(methods), study_of(trace, model, progress, measured)
    if stages.read is not None and any(layer.shared is not None for layer in trace.layers):
        raise NotApplicable(
            f"{stages.read.key} reads the prompt by itself, which is not supported where layers share keys and values"
        )
    if stages.read is None or not trace.compressible or _rows_stay(trace, methods, stages, dtype, budget):
        plan = plan_of(study, methods, dtype, budget)
        if plan.closes_up and model is not None:
            _check_turning(plan, model)
        return plan

    full = uncompressed_nbytes(trace, dtype)
    limited = stages.read.effective_budget if budget is None else budget
    limit = None if limited is None else limited.nbytes(full)
    if limited is not None and limited.kind == "tokens":
        limit = min(int(limited.amount * full / trace.tokens), full)
    finished = chunked_prefill(study, stages.read, dtype, limit, question)
    result = finished.result
    if stages.store is not None:
        form, made = read_and_stored(trace, result.stores, stages.store, dtype, full)
        notes = notes_on(trace.compressible, result.stores, made, stages.store)
        result = replace(result, stores=made, format=form, notes=(*result.notes, *notes))
        finished = replace(finished, result=result)
    tiers = result.tiers
    if tiers is None:
        tiers = stacked([as_held(store.tiers(trace.tokens), trace.kv_heads) for store in result.stores])
    copies = cloned(result.stores)
    return ChunkedPlan(
        trace,
        tuple(methods),
        stages,
        result.format,
        tiers,
        dtype,
        nbytes=sum(store.nbytes for store in copies),
        full_nbytes=full,
        host_nbytes=sum(store.host_nbytes for store in copies),
        expanded=expanded_by(stages, trace.compressible, dtype),
        prefill=finished,
    )


def _rows_stay(
    trace: Trace, methods: Sequence[KVMethod], stages: Stages, dtype: torch.dtype, budget: Budget | None
) -> bool:
    """Whether a recording holds latent rows for all of which there is room."""
    full = uncompressed_nbytes(trace, dtype)
    return trace.recorded and rows_fit(trace, stages, total_budget(methods, stages, budget), full)


def _check_turning(plan: Plan, model: PreTrainedModel) -> None:
    """Raise NotApplicable where keys cannot be turned to their place in the cache."""
    assert plan.stages.place is not None
    key, until = plan.stages.place.key, switch(model)
    if until is not None:
        raise NotApplicable(
            f"{key} closes positions up, but {type(model).__name__} rotates by another table beyond {until} tokens, "
            "and what a key was turned by depends on what was read with it; use true positions"
        )
    for layer in plan.trace.compressible:
        if layer.rotary is None:
            raise NotApplicable(f"{key} closes positions up, but layer {layer.called} has none that could be turned")
        layer.rotary(0)  # says why, where it cannot be turned
