"""CapKV."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from workbench.kv.base import KVMethod, keep_first
from workbench.kv.methods.evict.expected_attention import ahead
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class CapKV(KVMethod):
    """Keep what adds most to the span of the values that will be asked for.

    Each token's value weighs w = exp(tau · cosine of its key with the mean query to come); its score is its share of
    the log determinant of I + sum of w v vᵀ: w vᵀ (I + sum)⁻¹ v. Queries to come are those of the prompt under the mean
    rotation of the next positions, as in expected attention. The first tokens always stay and are not counted.
    """

    key = "capkv"
    title = "CapKV"
    paper = Paper("CapKV", "2026", "2604.25975")
    claim = "keeps the cache's capacity, without looking at attention"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, the authors': presses/cap_press.py, 0.5.5",
            tau=5.0, n_future_positions=512, sinks=4, epsilon=1e-6,
        ),
    )  # fmt: skip
    default_budget = 0.5

    tau: float = param(5.0, ge=0, le=100, help="how sharply values are weighted by how their keys lie to the queries")
    n_future_positions: int = param(512, ge=1, le=8192, unit="tokens", help="how far ahead the queries are expected")
    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    epsilon: float = param(1e-6, ge=0, le=1, help="added to the weights in the sum")

    def score(self, layer: LayerTrace) -> Tensor:
        first = min(self.sinks, layer.tokens - 1)
        queries = layer.unrotated_queries()[:, first:].mean(dim=1, keepdim=True)  # [h, 1, d]
        asked = normalize(ahead(layer, queries, self.n_future_positions), dim=-1)  # [k, g, 1, d]
        keys = normalize(layer.keys[:, None, first:].float(), dim=-1)  # [k, 1, m, d]
        weights = self.tau * (asked @ keys.mT)[:, :, 0]  # [k, g, m]
        weights = (weights - weights.amax(dim=-1, keepdim=True)).exp()
        values = layer.values[:, None, first:].float()  # [k, 1, m, dv]
        span = values.mT @ ((weights + self.epsilon)[..., None] * values)
        span = span + torch.eye(values.shape[-1], device=values.device)
        share = (values.mT * torch.linalg.solve(span, values.mT)).sum(dim=-2)  # [k, g, m]
        return keep_first(pad((weights * share).mean(dim=1), (first, 0)), self.sinks)
