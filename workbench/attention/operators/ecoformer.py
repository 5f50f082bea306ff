"""EcoFormer."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from workbench.attention.operators.base import Operator, check, hide_later, per_head
from workbench.attention.operators.hashing import fitted, similarities
from workbench.attention.operators.linear import linear_attention
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class EcoFormer(Operator):
    """Linear attention on binary codes, whose products are additions.

    Each query and key becomes `bits` signs. The weight of key j for query i is their product plus bits + 1, so never
    below 1, divided by its sum over the keys seen; rows sum to 1. A code is the sign of projections of Gaussian
    similarities to `anchors` points, with their mean taken off. Projections begin as drawn (`seed`) and are fitted once
    so that tokens that attend to each other get like codes (kernel-based supervised hashing, section 4.2; bit by bit,
    by descent, as in the authors' code; see `hashing`). The authors fit on their first batch, here it is the first
    `fit` tokens of the recording, for each query head: from then on they are coded so. Before, anchors are drawn on the
    unit sphere, and the mean is that of the tokens so far.

    The paper's queries and keys are one and the same: here a query's code is made like those of the keys it is most
    like, anchors come from both, and each has its own mean. The model is not trained with the codes, as the paper's is.
    Causal form: sums run over the keys up to the query. `scale` cancels, since lengths do.

    On CUDA by the kernel of flash-linear-attention where that package is installed (see `linear_attention`).
    """

    key = "ecoformer"
    title = "EcoFormer"
    paper = Paper("EcoFormer: Energy-Saving Attention with Linear Complexity", "Liu et al. 2022", "2209.09004")
    claim = "linear complexity; 73 % less energy at 0.33 % lower accuracy (PVTv2-B0)"
    fidelity = Fidelity(
        "untrained part of a trained method",
        "the hash is fitted on the recording; the model was not trained with it, and its queries are not its keys",
    )
    presets = (
        Preset(
            "pvt",
            "ziplab/EcoFormer, pvt/configs/pvt_v2/pvt_v2_b0_ecoformer.py and pvt/hashing/ksh.py, a277f9e",
            bits=16,
            anchors=25,
            like=10,
            steps=100,
        ),
    )

    bits: int = param(16, ge=1, le=1024, unit="bits", help="length of a code")
    anchors: int = param(25, ge=1, le=4096, help="points that similarities are measured to, at most")
    like: int = param(10, ge=1, le=4096, help="keys that are to get a query's code, and as many its opposite")
    steps: int = param(100, ge=0, le=10_000, help="descent steps for each bit")
    fit: int = param(
        256,
        ge=0,
        le=65536,
        unit="tokens",
        help="first tokens, on which the hash is fitted; 0: it stays as drawn",
        own="the authors fit on a batch of images; 256 tokens are fitted in a second",
    )
    seed: int = param(
        0, ge=0, le=1_000_000, help="draws the anchors and projections", own="the authors' code draws without a seed"
    )

    def prepared(self, q: Tensor, k: Tensor, scale: float) -> Callable[[int, int], Tensor]:
        codes = self._codes(q, k)

        def rows(first: int, stop: int) -> Tensor:
            weights = torch.zeros(len(q), stop - first, stop, device=q.device)
            for part in codes:
                low, high = max(first, part.start), min(stop, part.stop)
                if low < high:
                    found = part.query[:, low:high] @ part.key[:, :high].transpose(1, 2) + (self.bits + 1)
                    weights[:, low - first : high - first, :high] = hide_later(found, low)
            return weights / weights.sum(-1, keepdim=True)

        return rows

    def rows(self, q: Tensor, k: Tensor, scale: float, first: int, stop: int) -> Tensor:
        return self.prepared(q[:, :stop], k[:, :stop], scale)(first, stop)

    def apply(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        check(q, k, v)
        value = pad(per_head(v, len(q)).float(), (0, 1), value=1.0)  # the ones add up to the row's sum
        parts = []
        for part in self._codes(q, k):
            query = pad(part.query[:, : part.stop], (0, 1), value=self.bits + 1.0)
            key = pad(part.key[:, : part.stop], (0, 1), value=1.0)
            parts.append(linear_attention(query, key, value[:, : part.stop], self.chunk)[:, part.start :])
        out = torch.cat(parts, dim=1)
        return (out[..., :-1] / out[..., -1:]).to(q.dtype)

    def _codes(self, q: Tensor, k: Tensor) -> list[_Codes]:
        """The codes of queries and keys, first as drawn, then as fitted."""
        tokens, k = q.shape[1], per_head(k, len(q))
        points, projections = (drawn.to(q.device) for drawn in _drawn(q.shape[-1], self.anchors, self.bits, self.seed))
        first = tokens if self.fit == 0 else min(self.fit, tokens)
        drawn = (_as_drawn(x[:, :first], points, projections) for x in (q, k))
        codes = [_Codes(0, first, next(drawn), next(drawn))]
        if tokens > first:
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(2 * first, generator=generator)[: self.anchors].to(q.device)
            learnt = fitted(q[:, :first], k[:, :first], projections[: len(places)], places, self.like, self.steps)
            codes.append(_Codes(first, tokens, learnt.queries(q), learnt.keys(k)))
        return codes


class _Codes(NamedTuple):
    """How the queries from `start` to `stop` - 1, and the keys before `stop`, are coded: [h, n, bits]."""

    start: int
    stop: int
    query: Tensor
    key: Tensor


def _as_drawn(x: Tensor, points: Tensor, projections: Tensor) -> Tensor:
    """Signs [h, n, bits] float32 of x [h, n, d]; the squared distance to points drawn on the sphere is 2 on average."""
    near = similarities(x, points[None], x.new_full((1, 1, 1), 2, dtype=torch.float64))
    mean = near.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    return ((near - mean) @ projections).sign().float()


@lru_cache(maxsize=8)
def _drawn(width: int, anchors: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Anchors [a, d] of length one and projections [a, bits], float64."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(anchors, width, generator=draw, dtype=torch.float64)
    return normalize(points, dim=-1), torch.randn(anchors, bits, generator=draw, dtype=torch.float64)
