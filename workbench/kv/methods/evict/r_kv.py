"""R-KV."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize, pad

from workbench.kv.base import keep_last
from workbench.kv.methods.evict.decoding import Decoding
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_ALIKE = 0.5  # cosine from which on two keys say the same, as in the authors' code
_ROWS = 1024  # keys that are compared with all others at once


@register
class RKV(Decoding):
    """Keep what is attended to and not said again, while a model reasons at length.

    A token's importance is the attention of the last `queries` queries, the largest of a group's, pooled over its
    neighbours; its redundancy is how alike its key is to all others, softmaxed, where each of them does not count the
    last key that it is like: so the latest of several that say the same stays. The score is importance times `weight`
    less redundancy times 1 - `weight` (section 3). What is held is scored so again whenever `every` tokens have come.
    """

    key = "r-kv"
    title = "R-KV"
    paper = Paper("R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", "Cai et al. 2025", "2505.24133")
    claim = "10 % of the cache keeps reasoning models' accuracy"
    fidelity = Fidelity("deviates", "the budget is the most that is ever held; the prompt is compressed too")
    presets = (
        Preset(
            "code", "Zefan-Cai/R-KV, rkv/compression/r1_kv.py and run_math.py's divide_length, d15c976",
            queries=8, kernel=7, weight=0.07, every=128,
        ),
    )  # fmt: skip
    default_budget = 0.5

    queries: int = param(8, ge=1, le=1024, unit="tokens", help="last queries that vote, and whose tokens always stay")
    kernel: int = param(7, ge=1, le=63, odd=True, unit="tokens", help="width of the pooling along the sequence")
    weight: float = param(0.07, ge=0, le=1, help="of importance against redundancy")
    every: int = param(128, ge=1, le=8192, unit="tokens", help="how many leave at once, a quarter of the cache at most")

    def score(self, layer: LayerTrace) -> Tensor:
        before = max(layer.tokens - self.queries, 0)
        if not before:
            return torch.full((layer.kv_heads, layer.tokens), torch.inf, device=layer.device)
        queries = layer.queries[:, -self.queries :].float().unflatten(0, (layer.kv_heads, -1))  # [k, g, w, d]
        logits = layer.scale * (queries @ layer.keys[:, None, :before].float().mT).amax(dim=1)  # [k, w, m]
        votes = max_pool1d(logits.softmax(dim=-1).mean(dim=1), self.kernel, stride=1, padding=self.kernel // 2)
        again = redundancy(layer.keys)[:, :before]
        scores = self.weight * votes - (1 - self.weight) * again
        return keep_last(pad(scores, (0, layer.tokens - before)), self.queries)


def redundancy(keys: Tensor) -> Tensor:
    """How alike each of keys [k, n, d] is to the others, softmaxed over them: float32 [k, n].

    Each key compares itself with all others but the last that it is like.
    """
    units = normalize(keys.float(), dim=-1)
    tokens = keys.shape[1]
    sums = torch.zeros(keys.shape[:2], device=keys.device)
    places = torch.arange(tokens, device=keys.device)
    for rows in places.split(_ROWS):
        alike = units[:, rows] @ units.mT  # [k, r, n]
        alike[:, torch.arange(len(rows), device=keys.device), rows] = 0
        last = torch.where(alike > _ALIKE, places, 0).amax(dim=-1, keepdim=True)
        sums += alike.scatter_(-1, last, 0).sum(dim=1)
    return (sums / tokens).softmax(dim=-1)
