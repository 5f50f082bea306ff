"""What an attention operator is: a function of recorded queries, keys and values, looked at beside exact attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.errors import BadBudget, InputError
from workbench.registry import Family, Method, param


class Operator(Method):
    """Base of all operators: other functions of (q, k, v) than softmax attention, in their causal form.

    An operator is studied on what a reading recorded and never run inside the model: the model was trained with softmax
    attention, and most of these papers train theirs with the operator. So it is no part of a recipe and has no budget.

    Shapes: q [h, n, d], k [k, n, d], v [k, n, dv] of one layer, h a multiple of k; query i stands at position i and
    sees the keys 0 .. i. Everything is computed in float32 or better.
    """

    family: ClassVar[Family] = "operator"

    chunk: int = param(
        128,
        ge=1,
        le=65536,
        unit="tokens",
        help="queries computed together; the result is the same",
        own="how it is computed, not what",
    )

    @classmethod
    def takes_budget(cls) -> bool:
        return False

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None:
            raise BadBudget(f"{self.key}: an operator has no budget: leave it out")

    @abstractmethod
    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        """The implied attention of queries first .. stop - 1 over keys 0 .. stop - 1: [h, stop - first, stop] float32.

        What the output is, is these weights times the values. They are zero after each query's own position; whether
        they are positive, and what a row sums to, is the operator's affair. q, k: as in the class's own description.
        Memory grows with (stop - first) * stop.
        """

    def prepared(self, q: Tensor, k: Tensor, scale: float) -> Callable[[int, int], Tensor]:
        """`rows` of one recording, to be asked for chunk after chunk: what they have in common is computed once."""
        return partial(self.rows, q, k, scale)

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The whole implied attention map, [h, n, n] float32: n * n numbers a head."""
        return self.rows(q, k, scale, 0, q.shape[1])

    def plain(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The output [h, n, dv] in the queries' precision, as the whole map times the values."""
        check(q, k, v)
        return (self.weights(q, k, scale) @ per_head(v, len(q)).float()).to(q.dtype)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The output [h, n, dv] in the queries' precision, chunk by chunk: memory grows with n, not with n * n."""
        check(q, k, v)
        values, rows = per_head(v, len(q)).float(), self.prepared(q, k, scale)
        out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
        for first, stop in chunks(0, q.shape[1], self.chunk):
            out[:, first:stop] = rows(first, stop) @ values[:, :stop]
        return out

    def for_head(self, head: int, heads: int) -> Operator:
        """The operator as query head `head` of `heads` has it, to be applied to that head alone."""
        return self


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InputError for queries, keys and values that are not of one layer and one prompt."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise InputError(f"an operator takes q [h, n, d], k [k, n, d], v [k, n, dv], not {shapes}")
    if q.shape[1] != k.shape[1] or not q.shape[1] or not len(k) or len(q) % len(k):
        raise InputError(f"an operator takes as many queries as keys, and shares each KV head evenly: {shapes}")


def per_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [k, n, d] repeated for the query heads that read them: [h, n, d]."""
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)


def chunks(first: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` positions."""
    return [(start, min(start + size, stop)) for start in range(first, stop, size)]


def hide_later(weights: Tensor, first: int) -> Tensor:
    """Set to zero, in place, what lies after each query: weights [h, r, stop] of the queries from `first` on."""
    return weights.tril_(diagonal=first)
