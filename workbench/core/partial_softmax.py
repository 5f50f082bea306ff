"""Attention over some of the keys as the state of a softmax, and how such states are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench_kernels import Scoring

ROWS = 128  # queries taken together: their scores over some thousand keys stay in a CPU's caches


def scaled_scores(rows: Tensor, keys: Tensor, scoring: Scoring, offsets: Tensor | None = None) -> Tensor:
    """Scores [h, r, c] of float queries rows [h, r, d], scaled already, with keys [k, c, d], whose heads share them.

    offsets int [k or 1, c] or [c], where there are slopes: how far keys stand ahead of one of the queries, for all
    parts of a softmax the same one (`Scoring.offsets`).
    """
    k, c, _ = keys.shape
    products = torch.bmm(rows.reshape(k, -1, rows.shape[-1]), keys.to(rows.dtype).transpose(1, 2))
    return scoring.bent(products.view(*rows.shape[:2], c), by_query_head(offsets, len(rows)))


def between(scoring: Scoring, stop: int, low: int, high: int, device: torch.device) -> Tensor | None:
    """Offsets, where there are slopes, of keys at positions low .. high - 1 for queries up to the one before `stop`."""
    if scoring.slopes is None:
        return None
    return scoring.offsets(torch.tensor(stop - 1), torch.arange(low, high, device=device))


def by_query_head(offsets: Tensor | None, heads: int) -> Tensor | None:
    """Offsets [k or 1, c] or [c], beside scores [h, r, c] of the query heads that share them."""
    if offsets is None or offsets.ndim == 1:
        return offsets
    return offsets.repeat_interleave(heads // len(offsets), dim=0)[:, None] if len(offsets) > 1 else offsets[:, None]


def exponentiated(scores: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The largest score along a dimension, which is kept, and exp(score - largest) in place of the scores.

    Where all scores are minus infinity the largest is finite, so that all weights are zero.
    """
    maximum = scores.amax(dim=dim, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    return maximum, scores.sub_(maximum).exp_()


@dataclass(frozen=True)
class PartialSoftmax:
    """Attention of h heads' queries over some of their keys, not yet divided by the sum of the weights.

    maximum, total [h, r, 1]: each query's largest score here, and the sum of exp(score - maximum). weighted [h, r, dv]:
    the sum of the values with these weights. Merging states over disjoint sets of keys is associative: the softmax over
    all keys comes out, in whatever order they are merged.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def over_nothing(cls, rows: Tensor, width: int) -> Self:
        """The state before any key was seen, of queries rows [h, r, d] and values of `width` channels."""
        maximum = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min)  # finite: no inf - inf
        return cls(maximum, torch.zeros_like(maximum), rows.new_zeros(*rows.shape[:2], width))

    @classmethod
    def over(
        cls,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        scoring: Scoring,
        *,
        hidden: Tensor | None = None,
        bias: float = 0.0,
        offsets: Tensor | None = None,
    ) -> Self:
        """Of float32 queries rows [h, r, d], scaled already, over keys [k, c, d] and values [k, c, dv]; c is not 0.

        hidden: bool [r, c] or [h, r, c], where a query may not look. bias: added to every score. offsets: as in
        `scaled_scores`.
        """
        scores = scaled_scores(rows, keys, scoring, offsets)
        if bias:
            scores += bias
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return cls.of_scores(scores, values)

    @classmethod
    def of_scores(cls, scores: Tensor, values: Tensor) -> Self:
        """Of scores [h, r, c], -inf where a query may not look, over values [k, c, dv]. The scores are overwritten."""
        maximum, weights = exponentiated(scores)
        return cls(maximum, weights.sum(dim=-1, keepdim=True), weighted_sum(weights, values))

    def extended(self, scores: Tensor, values: Tensor) -> Self:
        """With more keys, of scores [h, r, c] over values [k, c, dv]. The scores are overwritten."""
        maximum = torch.maximum(self.maximum, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(maximum).exp_()
        fade = (self.maximum - maximum).exp_()  # what was summed up so far, measured by the new maximum
        total = self.total * fade + weights.sum(dim=-1, keepdim=True)
        return type(self)(maximum, total, self.weighted * fade + weighted_sum(weights, values))

    def merged(self, other: Self) -> Self:
        """Both states as one; they must not have a key in common."""
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = (self.maximum - maximum).exp_(), (other.maximum - maximum).exp_()
        total = self.total * mine + other.total * theirs
        return type(self)(maximum, total, self.weighted * mine + other.weighted * theirs)

    def output(self, scoring: Scoring) -> Tensor:
        """The attention output [h, r, dv]; sinks of the scoring, one key more without value, take part here."""
        if scoring.sinks is None:
            return self.weighted / self.total
        sunk = scoring.sinks.to(self.total.device, self.total.dtype)[:, None, None].expand_as(self.maximum)
        whole = self.merged(type(self)(sunk, torch.ones_like(sunk), torch.zeros_like(self.weighted)))
        return whole.weighted / whole.total


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [h, r, c] times values [k, c, dv] in the weights' precision: [h, r, dv]."""
    k, (h, r, c) = values.shape[0], weights.shape
    return torch.bmm(weights.reshape(k, -1, c), values.to(weights.dtype)).view(h, r, -1)
