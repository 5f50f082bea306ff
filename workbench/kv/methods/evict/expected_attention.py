"""Expected attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.adaptive_heads import best_beyond_least
from workbench.kv.base import KVMethod, keep_first
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace
from workbench_kernels.softmax import normalised


class AdaptiveHeads(KVMethod):
    """Share the room of a layer out by the best scores of all its heads, as AdaKV does in kvpress.

    A base class, so that the division yields to an allocator of the recipe.
    """

    head_adaptive = True

    heads: Literal["adaptive", "equal"] = param(
        "adaptive", help="the layer's best scores share its room out, or each head has the same"
    )
    safeguard: float = param(0.2, ge=0, le=1, help="share of an equal split that every head is certain of")

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        if self.heads == "equal":
            return super().allocate(ranking, entries)
        return best_beyond_least(ranking, entries, self.safeguard)


@register
class ExpectedAttention(AdaptiveHeads):
    """Keep what future queries are expected to attend to.

    The prompt's queries, before rotary embedding, are taken as a Gaussian; turned to the mean rotation of the next
    positions it gives every key its expected attention, exp(mean·k + k·covariance·k / 2) up to normalisation, which
    is weighted by the length of its value (section 3). `epsilon` is added before, so that where almost nothing is
    expected the lengths decide. Heads of a group are averaged; the heads of a layer share its room out by the best
    scores, as AdaKV's do.
    """

    key = "expected-attention"
    title = "Expected attention"
    paper = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        "Devoto et al. 2025",
        "2510.00636",
    )
    claim = "half the cache with little loss, for prompts and for long answers"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, the authors': evaluation/evaluate_registry.py and its defaults, 8bb29b9",
            epsilon=0.01, heads="adaptive", safeguard=0.2,
            n_future_positions=512, sinks=4, covariance=True, value_norm=True,
        ),
        Preset(
            "kvpress-class", "NVIDIA/kvpress, presses/expected_attention_press.py alone, 8bb29b9",
            epsilon=0.0, heads="equal",
        ),
    )  # fmt: skip
    default_budget = 0.5

    n_future_positions: int = param(512, ge=1, le=8192, unit="tokens", help="how far ahead the queries are expected")
    sinks: int = param(
        4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay and are not counted"
    )
    covariance: bool = param(True, help="use the spread of the queries, not only their mean")
    value_norm: bool = param(True, help="weight the expected attention by the length of the value")
    epsilon: float = param(0.01, ge=0, le=1, help="added to the expected attention before it is weighted")

    def score(self, layer: LayerTrace) -> Tensor:
        first = min(self.sinks, layer.tokens - 1)
        queries = layer.unrotated_queries()[:, first:]
        mean = queries.mean(dim=1, keepdim=True)  # [h, 1, d]
        keys = layer.keys[:, None, first:].float()  # [k, 1, m, d]
        logits = layer.scale * (ahead(layer, mean, self.n_future_positions) @ keys.mT)[:, :, 0]  # [k, g, m]
        if self.covariance:
            spread = (queries - mean).mT @ (queries - mean) / queries.shape[1]  # [h, d, d]
            half = ahead(layer, spread, self.n_future_positions).flatten(0, 1).mT
            turned = ahead(layer, half, self.n_future_positions)  # rotation · spread · rotationᵀ
            logits += layer.scale**2 / 2 * (keys @ turned * keys).sum(dim=-1)
        scores = normalised(logits[:, :, None], layer.scoring)[:, :, 0].mean(dim=1)  # [k, m]
        if self.value_norm:
            scores = (scores + self.epsilon) * layer.values[:, first:].float().norm(dim=-1)
        return keep_first(pad(scores, (first, 0)), self.sinks)


def ahead(layer: LayerTrace, x: Tensor, count: int) -> Tensor:
    """Rows of x [h, n, d] under the mean rotation of the `count` positions to come, [k, g, n, d]."""
    positions = torch.arange(layer.end, layer.end + count, device=layer.device)
    cos, sin = (table.mean(dim=0, keepdim=True) for table in layer.rotation(positions))
    turned: Tensor = layer.rotation.by(x, cos, sin).unflatten(0, (-1, layer.groups))
    return turned
