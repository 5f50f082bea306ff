"""What a reading method has left, held in the store of another method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from workbench.errors import BadBudget, BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.kv.plan import held_shape
from workbench.kv.stores import Store
from workbench.kv.stores.format import INDEX_BYTES, Format
from workbench.kv.stores.representable import check_reach
from workbench.trace import LayerTrace, Trace


def read_and_stored(
    trace: Trace, stores: Sequence[Store], storing: KVMethod, dtype: torch.dtype, full: int
) -> tuple[Format, list[Store]]:
    """The stores of all layers with what may be compressed in the method's format, and that format.

    A layer that would take more bytes so than it does stays as it is (`notes_on` says which): what reading left was
    within its budget, and so is this. full: bytes of the uncompressed cache. Raises BudgetTooSmall where the storage
    method's own budget, if it was given one, is not met.
    """
    layers = trace.compressible
    entries, heads = sum(stores[layer.index].entries for layer in layers), sum(layer.kv_heads for layer in layers)
    shapes = [replace(held_shape(layer, dtype), tokens=-(-entries // heads)) for layer in layers]
    if storing.budget is None:
        form = storing.store(dtype, shapes, None)
        return form, _stored(stores, layers, form, dtype)
    limit = storing.budget.nbytes(full)
    if limit is None:
        raise BadBudget(f"{storing.key} keeps every token that was read: give its budget as a share or a size")
    fixed = sum(stores[layer.index].nbytes for layer in trace.layers if layer.index in trace.exact)
    room, former = limit - fixed - entries * INDEX_BYTES, None
    while True:
        form = storing.store(dtype, shapes, room)
        made = _stored(stores, layers, form, dtype)
        nbytes = sum(store.nbytes for store in made)
        if nbytes <= limit:
            return form, made
        if form == former:
            smallest = math.ceil(nbytes / full * 1e4) / 1e4
            raise BudgetTooSmall(
                f"{storing.key}: the budget {limit / full:.4g} cannot be met with what was read; the smallest possible "
                f"is {smallest:.4g}",
                smallest,
            )
        room, former = room - (nbytes - limit), form  # heads of unequal length take more than was foretold


def notes_on(
    layers: Sequence[LayerTrace], read: Sequence[Store], made: Sequence[Store], storing: KVMethod
) -> tuple[str, ...]:
    """Which of the layers that may be compressed a storage method left as they had been read."""
    same = [str(layer.index) for layer in layers if made[layer.index] is read[layer.index]]
    return (f"layers {', '.join(same)}: left as read, for {storing.key} would take more bytes there",) if same else ()


def _stored(stores: Sequence[Store], layers: Sequence[LayerTrace], form: Format, dtype: torch.dtype) -> list[Store]:
    made = list(stores)
    for layer in layers:
        before = stores[layer.index]
        after = before.rebuilt(partial(stored, layer=layer, form=form, dtype=dtype))
        if after.nbytes < before.nbytes:
            made[layer.index] = after
    return made


def stored(store: Store, layer: LayerTrace, form: Format, dtype: torch.dtype) -> Store:
    """The entries of a layer's store, at their positions, in another format.

    It works on as many positions as any head holds, not on all that were read.
    """
    held = store.contents(dtype)
    positions = held.positions.expand(held.keys.shape[0], -1).long()  # [k, m]
    valid = torch.ones_like(positions, dtype=torch.bool) if held.valid is None else held.valid
    where = positions[valid].unique()  # [u] ascending
    complete = (
        bool(valid.all()) and positions.numel() == len(where) * len(positions) and len(where) == int(where[-1]) + 1
    )
    # A column that nobody holds makes any other store note positions.
    columns = torch.searchsorted(where, positions).clamp_max_(len(where) - 1)
    keep = torch.zeros(len(positions), len(where) + (not complete), dtype=torch.bool, device=where.device)
    head = torch.arange(len(positions), device=where.device)[:, None].expand_as(columns)[valid]
    keep[head, columns[valid]] = True

    def spread(x: Tensor) -> Tensor:
        rows = x.new_zeros(*keep.shape, x.shape[-1])
        rows[head, columns[valid]] = x[valid]
        return rows

    keys, values = spread(held.keys), spread(held.values)
    queries = torch.empty(layer.heads, keep.shape[1], keys.shape[-1], dtype=dtype, device="meta")  # there are none
    compact = replace(layer, keys_held=keys, values_held=values, queries_held=queries, device=keys.device)
    made = form.build(compact, keep.to(torch.uint8), None)
    check_reach(made, compact)
    if not complete:
        made.stand_at(where)
    return made
