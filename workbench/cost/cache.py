"""What a recipe's KV methods hold of a prompt that nobody has read, and which kernel attends over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.budget import Budget
from workbench.cost.architecture import Architecture
from workbench.kv.base import KVMethod, Stages
from workbench.kv.foretelling import Foretold, foretell
from workbench.kv.plan import held_shape
from workbench.kv.selection import Decision
from workbench.trace import Trace

_DENSE, _RAGGED = "attention", "attention ragged"
_MEASURED = ("8-bit", "4-bit", "2-bit")


@dataclass(frozen=True)
class HeldLayer:
    """One layer's keys and values of one sequence: bytes, entries of a KV head, and the kernel that attends over them.

    measured: whether that kernel was timed; else another's times stand for it.
    """

    nbytes: float
    entries: int
    kernel: str
    measured: bool = True


@dataclass(frozen=True)
class Cache:
    """The caches of one sequence under a recipe.

    nbytes: on the device, host_nbytes: in host memory, full_nbytes: uncompressed, as the model's own cache holds it.
    reading_nbytes: what is held on the device while the prompt is read. layers: those that attend.
    """

    nbytes: int
    host_nbytes: int
    full_nbytes: int
    reading_nbytes: int
    layers: tuple[HeldLayer, ...]
    notes: tuple[str, ...] = ()


def cache_under(
    methods: Sequence[Any], budget: Budget | None, architecture: Architecture, tokens: int, dtype: torch.dtype
) -> Cache:
    """The caches of a prompt of so many tokens, counted in `dtype`. Raises what planning raises."""
    full = architecture.kv_nbytes(tokens, dtype)
    trace = architecture.trace(tokens, dtype)
    kv = [method for method in methods if isinstance(method, KVMethod)]
    changes = [method for method in kv if method.supplied]
    if not changes or not trace.layers:
        by_number = {layer.layer: layer for layer in architecture.layers}
        sources = [by_number[layer.layer if layer.shared is None else layer.shared] for layer in architecture.layers]
        own = [
            HeldLayer(
                layer.held(tokens) * layer.entry * dtype.itemsize,
                layer.held(tokens),
                _DENSE,
                measured=not layer.holds_rows,
            )
            for layer in sources  # who shares reads what another holds
            if layer.kv_heads
        ]
        return Cache(full, 0, full, full, tuple(own), _latents(architecture, tokens, dtype, full))
    told = foretell(trace, kv, dtype, budget)
    stages = Stages.of(kv)
    reading = told.nbytes if stages.read is not None else told.full_nbytes
    notes = list(_latents(architecture, tokens, dtype, full))
    if told.at_most:
        notes.append("KV bytes are an upper bound: how much stays follows from the prompt")
        if told.decision is None:
            notes.append("what may lie in host memory besides is not told")
    if told.decision is not None and told.decision.expanded is not None:
        notes.append(f"{told.decision.expanded}: keys and values are held in place of latent rows (MLA)")
    if told.even:
        notes.append("KV bytes are told as if all heads kept equally much; the prompt decides how they share")
    if stages.select is not None:
        notes.append(f"{stages.select.key} reads a part of what is held; its steps are told as if they read all")
    return Cache(told.nbytes, told.host_nbytes, full, reading, tuple(_layers(trace, told, dtype)), tuple(notes))


def _layers(trace: Trace, told: Foretold, dtype: torch.dtype) -> list[HeldLayer]:
    fixed = [held_shape(layer.rows, dtype) for layer in trace.layers if layer.index in trace.exact]
    made = [HeldLayer(shape.full_nbytes, shape.tokens, _DENSE) for shape in fixed]
    count = len(trace.layers) - len(made)
    if not count:
        return made
    each = (told.nbytes - sum(layer.nbytes for layer in made)) / count
    counts = None if told.decision is None else told.decision.counts
    if told.decision is None or counts is None:
        return made + [HeldLayer(each, trace.tokens, _DENSE, measured=False)] * count
    kernel, measured = _kernel(told.decision)
    if kernel == _DENSE and not bool((counts == trace.tokens).all()):
        kernel = _RAGGED
    rows = any(layer.latents for layer in trace.layers) and told.decision.expanded is None
    return made + [HeldLayer(each, int(counts.float().mean()), kernel, measured and not rows)] * count


def _kernel(decision: Decision) -> tuple[str, bool]:
    """The kernel that was timed on entries stored so; that of plain rows stands for others."""
    first, *rest = decision.form.tiers
    if rest or decision.form.attends_itself:
        return _DENSE, False
    if first in _MEASURED:
        return f"attention packed {first.removesuffix('-bit')} bit", True
    return _DENSE, first in ("bfloat16", "float16", "float32")


def _latents(architecture: Architecture, tokens: int, dtype: torch.dtype, full: int) -> tuple[str, ...]:
    latent = architecture.latent_nbytes(tokens, dtype)
    if latent is None:
        return ()
    heads = architecture.heads_nbytes(tokens, dtype)
    own = "rows" if full == latent else "heads"
    told = f"latent rows (r + d_r) are {latent:,} bytes a sequence, keys and values of every head {heads:,}"
    return (f"latent attention: the model's own cache holds {own}; {told}",)
