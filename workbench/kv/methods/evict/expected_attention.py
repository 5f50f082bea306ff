"""Expected attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import KVMethod, keep_first
from workbench.registry import Paper, param, register
from workbench.trace import LayerTrace


@register
class ExpectedAttention(KVMethod):
    """Keep what future queries are expected to attend to.

    The prompt's queries, before rotary embedding, are taken as a Gaussian; turned to the mean rotation of the next
    positions it gives every key its expected attention, exp(mean·k + k·covariance·k / 2) up to normalisation, which
    is weighted by the length of its value (section 3). Heads of a group are averaged.
    """

    key = "expected-attention"
    title = "Expected attention"
    paper = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        "Devoto et al. 2025",
        "2510.00636",
    )
    claim = "half the cache with little loss, for prompts and for long answers"
    default_budget = 0.5

    n_future_positions: int = param(512, ge=1, le=8192, unit="tokens", help="how far ahead the queries are expected")
    sinks: int = param(
        4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay and are not counted"
    )
    covariance: bool = param(True, help="use the spread of the queries, not only their mean")
    value_norm: bool = param(True, help="weight the expected attention by the length of the value")
    epsilon: float = param(0.0, ge=0, le=1, help="added to the expected attention before it is weighted")

    def score(self, layer: LayerTrace) -> Tensor:
        first = min(self.sinks, layer.tokens - 1)
        queries = layer.unrotated_queries()[:, first:]
        mean = queries.mean(dim=1, keepdim=True)  # [h, 1, d]
        keys = layer.keys[:, None, first:].float()  # [k, 1, m, d]
        logits = layer.scale * (self._ahead(layer, mean) @ keys.mT)[:, :, 0]  # [k, g, m]
        if self.covariance:
            spread = (queries - mean).mT @ (queries - mean) / queries.shape[1]  # [h, d, d]
            turned = self._ahead(layer, self._ahead(layer, spread).flatten(0, 1).mT)  # rotation · spread · rotationᵀ
            logits += layer.scale**2 / 2 * (keys @ turned * keys).sum(dim=-1)
        scores = logits.softmax(dim=-1).mean(dim=1)  # [k, m]
        if self.value_norm:
            scores = (scores + self.epsilon) * layer.values[:, first:].float().norm(dim=-1)
        return keep_first(pad(scores, (first, 0)), self.sinks)

    def _ahead(self, layer: LayerTrace, x: Tensor) -> Tensor:
        """Rows of x [h, n, d] under the mean rotation of the positions to come, [k, g, n, d]."""
        positions = torch.arange(layer.end, layer.end + self.n_future_positions, device=layer.device)
        cos, sin = (table.mean(dim=0, keepdim=True) for table in layer.rotation(positions))
        ahead: Tensor = layer.rotation.by(x, cos, sin).unflatten(0, (-1, layer.groups))
        return ahead
