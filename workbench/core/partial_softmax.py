"""Attention over some of the keys, and how such parts are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench_kernels import Scoring

ROWS = 128  # queries taken together: their scores over some thousand keys stay in a CPU's caches


@dataclass(frozen=True)
class Part:
    """Attention of h heads' queries over some of their keys, not yet divided by the sum of the weights.

    highest, total [h, r, 1]: each query's largest score here, and the sum of exp(score - highest). mixed [h, r, dv]:
    the values summed with these weights. Joining parts is associative: the softmax over all keys comes out, in whatever
    order its parts are joined.
    """

    highest: Tensor
    total: Tensor
    mixed: Tensor

    @classmethod
    def of(
        cls,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        *,
        hidden: Tensor | None = None,
        bias: float = 0.0,
    ) -> Self:
        """Of float32 queries rows [h, r, d], scaled already, over keys [k, c, d] and values [k, c, dv]; c is not 0.

        hidden: bool [r, c] or [h, r, c], where a query may not look. bias: added to every score.
        """
        k, c, _ = keys.shape
        scores = torch.bmm(rows.reshape(k, -1, rows.shape[-1]), keys.float().transpose(1, 2)).view(*rows.shape[:2], c)
        scores = scoring.cap(scores)
        if bias:
            scores += bias
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return cls.weighing(scores, values)

    @classmethod
    def weighing(cls, scores: Tensor, values: Tensor) -> Self:
        """Of scores [h, r, c], -inf where a query may not look, over values [k, c, dv]. The scores are overwritten."""
        k, (h, r, c) = values.shape[0], scores.shape
        highest = scores.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)  # finite if all hidden
        weights = scores.sub_(highest).exp_()
        mixed = torch.bmm(weights.view(k, -1, c), values.float()).view(h, r, -1)
        return cls(highest, weights.sum(dim=-1, keepdim=True), mixed)

    def joined(self, other: Self) -> Self:
        """Both parts as one; they must not have a key in common."""
        highest = torch.maximum(self.highest, other.highest)
        mine, theirs = (self.highest - highest).exp_(), (other.highest - highest).exp_()
        total = self.total * mine + other.total * theirs
        return type(self)(highest, total, self.mixed * mine + other.mixed * theirs)

    def output(self) -> Tensor:
        """The attention output [h, r, dv]."""
        return self.mixed / self.total
