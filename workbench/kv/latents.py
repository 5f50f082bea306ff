"""Whether a recipe leaves layers of latent attention (MLA) their rows, which all heads share, or holds the keys and
values that are made of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.budget import Budget
from workbench.kv.method import KVMethod
from workbench.kv.plan import held_shape
from workbench.kv.stages import Stages
from workbench.trace import LayerTrace, Trace


def expanded_by(stages: Stages, layers: Sequence[LayerTrace], dtype: torch.dtype) -> str | None:
    """Why keys and values of layers have to be held, as who does what; None: their rows are, or there are none.

    Rows can stay where every head keeps the same tokens and nothing but their numbers matters to who stores them.
    """
    if not layers or not all(layer.latents for layer in layers):
        return None
    choosing, storing, evicting = stages.allocate or stages.score, stages.store, stages.evict
    linear = all(layer.latents.expansion.linear for layer in layers if layer.latents)
    by_state = evicting if evicting is not None and not evicting.rescores else None
    reasons = {
        "gives each head a length of its own": choosing if choosing is not None and choosing.head_adaptive else None,
        "merges the keys and values of each head": stages.merge,
        "stores keys and values": storing if storing is not None and not _of_rows(storing, layers, dtype) else None,
        "evicts by attention, and keys are not linear in rows here": None if linear else by_state,
        "finds keys again by queries": stages.retrieve,
        "selects keys by queries": stages.select,
        "reads the prompt into stores of its own": stages.read,
    }
    return next((f"{who.key} {does}" for does, who in reasons.items() if who is not None), None)


def rows_fit(trace: Trace, stages: Stages, budget: Budget | None, full: int) -> bool:
    """Whether a budget has room for the rows of all layers, of which nothing needs to be taken then, whoever would; not
    for what leaves while decoding.
    """
    if budget is None or budget.kind == "tokens" or stages.evict is not None or not trace.compressible:
        return False
    return all(layer.latents for layer in trace.compressible) and (budget.nbytes(full) or 0) >= full


def _of_rows(storing: KVMethod, layers: Sequence[LayerTrace], dtype: torch.dtype) -> bool:
    rows = [held_shape(layer.rows, dtype) for layer in layers]
    return storing.of_entries and storing.store(dtype, rows, None).of_rows
