"""How much a recipe's cache will hold of a prompt that nobody has read: `plan_of` without its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.plan import held_shape, uncompressed_nbytes
from workbench.kv.ranking import Ranking
from workbench.kv.selection import Ranked, finished, nothing_left, sized, total_budget
from workbench.kv.stores.format import DenseFormat, Format, stored_nbytes
from workbench.trace import Trace

_NONE = torch.zeros(0, 0, dtype=torch.int64)


@dataclass(frozen=True)
class Foretold:
    """What a recipe's cache will hold of a prompt that nobody has read: bytes, and how entries are stored.

    form: the format of the layers that may be compressed. counts: entries of each of their heads, int64 [l, k].
    at_most: whether the prompt decides how much less it becomes; counts are then a guess, or none. even: whether bytes
    are those of heads that are given equally much, where the prompt decides otherwise and no budget bounds them.
    """

    form: Format
    counts: Tensor
    nbytes: int
    host_nbytes: int
    full_nbytes: int
    at_most: bool = False
    even: bool = False


def foretell(trace: Trace, methods: Sequence[KVMethod], dtype: torch.dtype, budget: Budget | None = None) -> Foretold:
    """What `plan_of` will hold of a prompt of this trace's shapes, none of whose numbers are there (meta tensors).

    Where an allocator goes by scores, each head is given as much as others. Raises what `plan_of` raises, and
    NotApplicable where the size follows from what is read and no budget bounds it.
    """
    stages, label = Stages.of(methods), " + ".join(method.key for method in methods)
    layers = trace.compressible
    shapes = [held_shape(layer, dtype) for layer in layers]
    full = uncompressed_nbytes(trace, dtype)
    fixed = sum(held_shape(layer, dtype).full_nbytes for layer in trace.layers if layer.index in trace.exact)
    limited = total_budget(methods, stages, budget)
    limit = None if limited is None else limited.nbytes(full)
    bound = None if limit is None else Foretold(DenseFormat(dtype), _NONE, min(limit, full), 0, full, at_most=True)
    if stages.read is not None:
        if limited is not None and limited.kind == "tokens":
            limit = int(limited.amount * full / trace.tokens)
            bound = Foretold(DenseFormat(dtype), _NONE, min(limit, full), 0, full, at_most=True)
        if bound is None:
            raise NotApplicable(f"{label} decides while it reads what stays: give it a budget")
        return bound
    if not layers:
        if limit is not None and fixed > limit:
            raise nothing_left(label, fixed, full)
        return Foretold(DenseFormat(dtype), _NONE, fixed, 0, full)
    selecting, allocating = stages.score, stages.allocate or stages.score
    ranked = None
    if selecting is not None and allocating is not None:
        unread = Ranking(torch.empty(len(shapes), shapes[0].kv_heads, shapes[0].tokens, device="meta"))
        ranked = _Unread(Study(trace), selecting, unread)
    try:
        form, counts, _ = sized(Study(trace), methods, stages, shapes, dtype, budget, full, fixed, label, ranked)
    except (RuntimeError, NotImplementedError) as error:  # what torch says where a number is asked for
        if bound is None:
            raise NotApplicable(
                f"{label} measures what it reads before it can tell its size: give a budget, which it keeps to"
            ) from error
        return bound
    even = ranked is not None and ranked.guessed
    nbytes = fixed + stored_nbytes(finished(form, counts, shapes), shapes, counts)
    host = stored_nbytes(finished(form, counts, shapes), shapes, counts, host=True)
    if even and limit is not None:
        return Foretold(form, counts, min(limit, full), host, full, at_most=True)
    return Foretold(form, counts, nbytes, host, full, even=even)


@dataclass
class _Unread(Ranked):
    """An order of which nothing is known but its shape. guessed: whether an allocator asked for more."""

    guessed: bool = False

    def at(self, entries: int) -> Ranking:
        return self.plain

    def wanted(self) -> int | None:
        if type(self.selecting).wanted is not KVMethod.wanted:
            raise NotApplicable(f"{self.selecting.key}: its scores say how much stays; give it a budget")
        return None

    def allocated(self, allocating: KVMethod, entries: int) -> Tensor:
        try:
            if type(allocating).importance is KVMethod.importance:
                return allocating.allocate(self.plain, entries).to("cpu")
        except (RuntimeError, NotImplementedError):  # it asked for a score
            pass
        self.guessed = True
        each = min(max(entries // (self.plain.layers * self.plain.kv_heads), 1), self.plain.tokens)
        return torch.full((self.plain.layers, self.plain.kv_heads), each)
