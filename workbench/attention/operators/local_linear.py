"""Local Linear Attention."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.attention.operators.base import Operator, per_head
from workbench.attention.operators.conjugate import conjugate_gradients
from workbench.registry import Fidelity, Paper, param, register


@register
class LocalLinear(Operator):
    """Fit a line to the values around each query, where softmax attention takes their mean.

    Softmax attention is a weighted mean of values; this is the weighted least squares fit of values by keys, with a
    ridge on its slope, taken at the query (the paper's section 3, written with centred moments). With p the softmax
    weights of query q, m and C mean and covariance of the keys under them, the weight of key j is

        p_j * (1 + (k_j - m) . (C + r)^-1 (q - m)).

    Rows sum to 1 and may be negative. A large `ridge` r gives softmax attention, a large `bandwidth` weighs all keys
    alike: the ridge regression of values on keys. The ridge is in units of the score scale (keys times the square root
    of `scale`) and for weights that sum to 1. Rows of weights are computed for one chunk of queries after the other;
    the slope comes from conjugate gradients that never build C, as in FlashLLA (`steps` at most). On any device, for
    flash-linear-attention has no kernel for it (its MesaNet is ridge regression without softmax and means).
    """

    key = "lla"
    title = "Local Linear Attention"
    paper = Paper(
        "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
        "Zuo et al. 2025",
        "2510.01450",
    )
    claim = "better associative recall than linear and softmax attention"
    fidelity = Fidelity("untrained part of a trained method", "the paper trains its models with the operator")

    ridge: float = param(
        10.0,
        ge=1e-3,
        le=1e9,
        help="how strongly a slope is held back; large: softmax attention",
        own="the paper learns it with the model",
    )
    bandwidth: float = param(
        1.0,
        ge=1e-2,
        le=1e9,
        help="what scores are divided by; large: all keys weigh alike",
        own="that of softmax attention, with which the model was trained",
    )
    steps: int = param(
        128,
        ge=1,
        le=4096,
        help="conjugate gradient steps at most",
        own="enough to arrive; how it is computed, not what",
    )

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The whole map, [h, n, n] float32, with each covariance built and solved: d * d numbers a query."""
        query, key = q.float() * scale**0.5, per_head(k, len(q)).float() * scale**0.5
        probs = self._softmax(query, key, 0)
        mean = probs @ key
        away = key[:, None] - mean[:, :, None]  # [h, n, n, d]
        covariance = torch.einsum("hij,hijd,hije->hide", probs, away, away)
        slope = torch.linalg.solve(covariance + self.ridge * torch.eye(q.shape[-1], device=q.device), query - mean)
        return probs * (1 + torch.einsum("hijd,hid->hij", away, slope))

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = q[:, first:stop].float() * scale**0.5, per_head(k[:, :stop], len(q)).float() * scale**0.5
        probs = self._softmax(query, key, first)  # [h, r, stop]
        mean = probs @ key

        def spread(x: Tensor) -> Tensor:
            """(C + r) x for each query, x [h, r, d]."""
            along = x @ key.transpose(1, 2) - (mean * x).sum(-1, keepdim=True)
            turned: Tensor = along.mul_(probs) @ key + self.ridge * x
            return turned

        slope = conjugate_gradients(spread, query - mean, self.steps)
        tilt: Tensor = slope @ key.transpose(1, 2) - (mean * slope).sum(-1, keepdim=True)
        return tilt.add_(1).mul_(probs)

    def _softmax(self, query: Tensor, key: Tensor, first: int) -> Tensor:
        scores = query @ key.transpose(1, 2) / self.bandwidth
        later = torch.ones_like(scores[0], dtype=torch.bool).triu_(diagonal=first + 1)
        return scores.masked_fill_(later, -torch.inf).softmax(-1)
