"""EcoFormer."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from workbench.attention.operators.base import Operator, check, hide_later, per_head
from workbench.attention.operators.linear import linear_attention
from workbench.registry import Paper, param, register


@register
class EcoFormer(Operator):
    """Linear attention on binary codes, whose products are additions.

    Each query and key becomes `bits` signs. The weight of key j for query i is their product plus bits + 1, so never
    below 1, divided by its sum over the keys seen; rows sum to 1. A code is the sign of random projections of Gaussian
    similarities to `anchors` points, with their mean taken off (kernelised hashing, as in the authors' code).

    The paper trains the projections so that tokens that attend to each other get like codes, on queries and keys that
    are one and the same. Here nothing is trained: projections and anchors are drawn (`seed`), the anchors on the unit
    sphere as the normalised queries and keys are, and the same for all heads. Causal form: the mean that is taken off
    is that of the tokens so far, of queries and of keys each, and sums run over the keys up to the query. `scale`
    cancels, since lengths do.

    On CUDA by the kernel of flash-linear-attention where that package is installed (see `linear_attention`).
    """

    key = "ecoformer"
    title = "EcoFormer"
    paper = Paper("EcoFormer: Energy-Saving Attention with Linear Complexity", "Liu et al. 2022", "2209.09004")
    claim = "linear complexity; 73 % less energy at 0.33 % lower accuracy (PVTv2-B0)"

    bits: int = param(16, ge=1, le=1024, unit="bits", help="length of a code")
    anchors: int = param(25, ge=1, le=4096, help="points that similarities are measured to")
    seed: int = param(0, ge=0, le=1_000_000, help="draws the anchors and projections")

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        query, key = self._codes(q[:, :stop])[:, first:], per_head(self._codes(k[:, :stop]), len(q))
        weights = hide_later(query @ key.transpose(1, 2) + (self.bits + 1), first)
        return weights / weights.sum(-1, keepdim=True)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        query = pad(self._codes(q), (0, 1), value=self.bits + 1.0)
        key = pad(per_head(self._codes(k), len(q)), (0, 1), value=1.0)
        value = pad(per_head(v, len(q)).float(), (0, 1), value=1.0)  # the ones add up to the row's sum
        out = linear_attention(query, key, value, self.chunk)
        return (out[..., :-1] / out[..., -1:]).to(q.dtype)

    def _codes(self, x: Tensor) -> Tensor:
        """Signs [k, n, bits] float32 of x [k, n, d]; in float64, so that a sign does not hang on rounding."""
        points, projections = (drawn.to(x.device) for drawn in _drawn(x.shape[-1], self.anchors, self.bits, self.seed))
        near = (normalize(x.double(), dim=-1) @ points.T - 1).mul_(0.5).exp_()  # squared distance 2 - 2 cos, mean 2
        mean = near.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return ((near - mean) @ projections).sign().float()


@lru_cache(maxsize=8)
def _drawn(width: int, anchors: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Anchors [a, d] of length one and projections [a, bits], float64."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(anchors, width, generator=draw, dtype=torch.float64)
    return normalize(points, dim=-1), torch.randn(anchors, bits, generator=draw, dtype=torch.float64)
