"""How much a recipe's cache will hold of a prompt that nobody has read: `plan_of` without its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.budget import Budget
from workbench.errors import NotApplicable
from workbench.kv.base import KVMethod, Stages, Study
from workbench.kv.plan import uncompressed_nbytes
from workbench.kv.ranking import Ranking
from workbench.kv.selection import Decision, Ranked, decide, total_budget
from workbench.trace import Trace


@dataclass(frozen=True)
class Foretold:
    """What a recipe's cache will hold of a prompt that nobody has read.

    decision: entries of each head and how they are stored; None where the prompt decides all of it, within a budget.
    at_most: whether the prompt decides how much less it becomes; counts are then a guess, or none. even: whether bytes
    are those of heads that are given equally much, where the prompt decides otherwise and no budget bounds them.
    """

    decision: Decision | None
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
    full, limited = uncompressed_nbytes(trace, dtype), total_budget(methods, stages, budget)
    limit = None if limited is None else limited.nbytes(full)
    if limited is not None and limited.kind == "tokens" and stages.read is not None:
        limit = int(limited.amount * full / trace.tokens)
    bound = None if limit is None else Foretold(None, min(limit, full), 0, full, at_most=True)
    if stages.read is not None:
        if bound is None:
            raise NotApplicable(f"{label} decides while it reads what stays: give it a budget")
        return bound
    unread = _Unread(trace)
    try:
        found = decide(Study(trace), methods, stages, dtype, budget, unread.order)
    except (RuntimeError, NotImplementedError) as error:  # what torch says where a number is asked for
        if bound is None:
            raise NotApplicable(
                f"{label} measures what it reads before it can tell its size: give a budget, which it keeps to"
            ) from error
        return bound
    if unread.guessed and bound is not None:
        return Foretold(found, bound.nbytes, found.host_nbytes, full, at_most=True)
    return Foretold(found, found.nbytes, found.host_nbytes, full, even=unread.guessed)


@dataclass
class _Unread:
    """Orders of entries of which nothing is known. guessed: whether an allocator asked for more than their number."""

    trace: Trace
    guessed: bool = False

    def order(self, selecting: KVMethod, allocating: KVMethod, refining: KVMethod | None, shared: bool) -> Ranked:
        """An order of as many entries as there are, of one head where all share them."""
        del allocating, refining
        heads = 1 if shared else self.trace.kv_heads
        scores = torch.empty(len(self.trace.compressible), heads, self.trace.tokens, device="meta")
        return _Unranked(Study(self.trace), selecting, Ranking(scores), None, shared, told=self)


@dataclass
class _Unranked(Ranked):
    """Such an order. told: who is told that heads were given equally much for want of scores."""

    told: _Unread = field(kw_only=True)

    def at(self, entries: int) -> Ranking:
        return self.whole

    def wanted(self) -> int | None:
        if type(self.selecting).wanted is not KVMethod.wanted:
            raise NotApplicable(f"{self.selecting.key}: its scores say how much stays; give it a budget")
        return None

    def allocated(self, allocating: KVMethod, entries: int) -> Tensor:
        try:
            if type(allocating).importance is KVMethod.importance:
                return allocating.allocate(self.whole, entries).to("cpu")
        except (RuntimeError, NotImplementedError):  # it asked for a score
            pass
        self.told.guessed = True
        each = min(max(entries // (self.whole.layers * self.whole.kv_heads), 1), self.whole.tokens)
        return torch.full((self.whole.layers, self.whole.kv_heads), each)
