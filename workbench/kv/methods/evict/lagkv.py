"""LagKV."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import KVMethod, keep_first
from workbench.kv.ranking import places
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class LagKV(KVMethod):
    """Keep, in every stretch of text, the tokens that stand out from the range of the stretch after it.

    After the sinks the prompt is cut into stretches of `lag` tokens. Keys and values of one are scaled by the
    smallest and largest of the next, channel by channel; a token's score is the softmax over its stretch of their
    standard deviation over the channels, averaged over keys and values (section 2.2). Every stretch keeps the same
    share of its best; the sinks and the tail that has no next stretch go last.
    """

    key = "lagkv"
    title = "LagKV"
    paper = Paper(
        "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        "Liang et al. 2025",
        "2504.04704",
    )
    claim = "nearly no loss at half the cache, without looking at attention"
    fidelity = Fidelity("deviates", "what is generated is not compressed, only the prompt")
    presets = (
        Preset("readme", "AI-Lab-China-Merchants-Bank/LagKV, README.md and lag_kv.py, 2a9d19e", lag=128, sinks=16),
        Preset("code", "AI-Lab-China-Merchants-Bank/LagKV, lag_kv.py, 2a9d19e", lag=1024, sinks=16),
        Preset("kvpress", "NVIDIA/kvpress, presses/lagkv_press.py, 8bb29b9", lag=128, sinks=4),
    )
    default_budget = 0.5

    sinks: int = param(16, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    lag: int = param(128, ge=2, le=4096, unit="tokens", help="length of the stretches that are compared")

    def score(self, layer: LayerTrace) -> Tensor:
        stretches = max((layer.tokens - self.sinks) // self.lag, 1)
        compared = (stretches - 1) * self.lag  # tokens that have a next stretch
        scores = torch.arange(layer.tokens, device=layer.device).float().expand(layer.kv_heads, -1)
        if compared:
            part = slice(self.sinks, self.sinks + stretches * self.lag)
            # Both [k, stretches - 1, lag], then [k, compared]: a token's place in its stretch, the best -1.
            deviation = self._stand_out(layer.keys[:, part]) + self._stand_out(layer.values[:, part])
            within = -places(deviation).flatten(1) - 1.0
            scores = torch.where(
                scores < self.sinks + compared, pad(within, (self.sinks, layer.tokens - self.sinks - compared)), scores
            )
        return keep_first(scores, self.sinks)

    def _stand_out(self, x: Tensor) -> Tensor:
        """How far the tokens of each stretch of x [k, t, d] stand out from the next: [k, stretches - 1, lag]."""
        stretches = x.float().unflatten(1, (-1, self.lag))  # [k, s, lag, d]
        low, high = stretches[:, 1:].aminmax(dim=2, keepdim=True)
        scaled = (stretches[:, :-1] - low) / (high - low).clamp_min(1e-12)
        deviation: Tensor = scaled.std(dim=-1)
        return deviation.softmax(dim=-1)
