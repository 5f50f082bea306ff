"""LagKV."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import Holding, KVMethod, keep_first
from workbench.kv.held import HeldLayer
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

    What is generated is compressed as it comes (section 2.1): whenever the tail has grown to two stretches, the older
    one is compared with the newer and keeps the same share as those of the prompt, rounded down. So the cache goes on
    growing, by that share of what comes, and by up to a stretch in between; `decoding` keeps to a budget instead.
    """

    key = "lagkv"
    title = "LagKV"
    paper = Paper(
        "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        "Liang et al. 2025",
        "2504.04704",
    )
    claim = "nearly no loss at half the cache, without looking at attention"
    fidelity = Fidelity("as published")
    presets = (
        Preset("readme", "AI-Lab-China-Merchants-Bank/LagKV, README.md and lag_kv.py, 2a9d19e", lag=128, sinks=16),
        Preset("code", "AI-Lab-China-Merchants-Bank/LagKV, lag_kv.py, 2a9d19e", lag=1024, sinks=16),
        Preset("kvpress", "NVIDIA/kvpress, presses/lagkv_press.py, 8bb29b9", lag=128, sinks=4),
    )
    default_budget = 0.5
    rescores = True
    grows = True

    sinks: int = param(16, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    lag: int = param(128, ge=2, le=4096, unit="tokens", help="length of the stretches that are compared")
    decode: bool = param(
        True,
        help="also compress what is generated",
        own="the authors' cache always does; off for stores that cannot",
    )

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

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

    def leaving_at_once(self, holding: Holding) -> int:
        leaving = self.lag - self._kept(holding)
        done = (self._compared(holding.tokens) - self._compared(holding.prompt)) * leaving
        return min(leaving, max(holding.entries - (holding.planned + holding.tokens - holding.prompt - done), 0))

    def rescore(self, held: HeldLayer, scorer: KVMethod, holding: Holding) -> Tensor:
        left = holding.planned + holding.tokens - holding.prompt - holding.entries
        stretch = self._compared(holding.prompt) + left // max(self.lag - self._kept(holding), 1)
        first = self.sinks + stretch * self.lag
        old, new = ((held.positions >= at) & (held.positions < at + self.lag) for at in (first, first + self.lag))
        scores = sum(stands_out(x.float(), old, new) for x in (held.keys, held.values))
        assert isinstance(scores, Tensor)
        return torch.where(old, scores, 2.0 + held.positions)  # softmaxes add up to less

    def _compared(self, tokens: int) -> int:
        """How many stretches of a text have a next one."""
        return max((tokens - self.sinks) // self.lag - 1, 0)

    def _kept(self, holding: Holding) -> int:
        """How many tokens a stretch keeps: as those of the prompt, or, where it had none, as many as of the prompt."""
        stretches = self._compared(holding.prompt)
        rest = holding.prompt - stretches * self.lag  # sinks and the tail
        if stretches and holding.planned > rest:
            return (holding.planned - rest) // stretches
        return holding.planned * self.lag // holding.prompt


def stands_out(x: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """How far the entries of x [k, m, d] at which old [k, m] is True stand out from those at which `new` is: a softmax
    over them of the deviation over channels, scaled by the smallest and largest of the new ones; elsewhere 0.
    """
    low = x.masked_fill(~new[..., None], torch.inf).amin(dim=1, keepdim=True)
    high = x.masked_fill(~new[..., None], -torch.inf).amax(dim=1, keepdim=True)
    deviation = ((x - low) / (high - low).clamp_min(1e-12)).std(dim=-1)
    return deviation.masked_fill(~old, -torch.inf).softmax(dim=-1).masked_fill(~old, 0.0)
