"""InLine: injective linear attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, relu

from workbench.attention.operators.base import Operator, check, hide_later, per_head
from workbench.attention.operators.linear import linear_attention
from workbench.registry import Fidelity, Paper, param, register


@register
class InLine(Operator):
    """Linear attention normalised by subtraction, so that different queries never get the same weights.

    The weight of key j for query i is (1 + scale * f(q_i) . (f(k_j) - m_i)) / c: the mean over the c keys seen is
    subtracted instead of the sum divided by (the paper's equation 5, with the scale / n of the authors' code). Rows sum
    to 1 and may be negative. With f as it is, this is softmax attention to first order in the scores. Causal form: the
    mean m_i and the count c = i + 1 are those of the keys up to the query. The paper adds a local residual, a small
    convolution of the values with weights that a trained network predicts: left out.

    On CUDA by the kernel of flash-linear-attention where that package is installed (see `linear_attention`).
    """

    key = "inline"
    title = "InLine attention"
    paper = Paper("Bridging the Divide: Reconsidering Softmax and Linear Attention", "Han et al. 2024", "2412.06590")
    claim = "linear complexity, and more accurate vision models than with softmax attention"
    fidelity = Fidelity(
        "untrained part of a trained method", "the local residual, which a trained network predicts, is absent"
    )

    feature: Literal["identity", "relu", "leaky relu", "exp"] = param(
        "identity",
        help="what queries and keys go through; exp is that of a fifth",
        own="the paper trains with each of them; as it is, the operator is softmax attention to first order",
    )

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = self._features(q[:, first:stop]) * scale, self._features(per_head(k[:, :stop], len(q)))
        count = torch.arange(first + 1, stop + 1, device=q.device)[:, None]
        mean = key.cumsum(1)[:, first:] / count  # [h, r, d]
        above = query @ key.transpose(1, 2) - (query * mean).sum(-1, keepdim=True)
        return hide_later((1 + above) / count, first)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        query, key = self._features(q) * scale, self._features(per_head(k, len(q)))
        value = per_head(v, len(q)).float()
        count = torch.arange(1, q.shape[1] + 1, device=q.device)[:, None]
        total = value.cumsum(1)
        share = 1 - (query * key.cumsum(1)).sum(-1, keepdim=True) / count  # what the mean value gets, [h, n, 1]
        return ((linear_attention(query, key, value, self.chunk) + share * total) / count).to(q.dtype)

    def _features(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.feature == "exp":
            return (0.2 * x).exp()
        return {"identity": x, "relu": relu(x), "leaky relu": leaky_relu(x)}[self.feature]
