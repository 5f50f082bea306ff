"""EMS."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.core.nearest import nearest_kept
from workbench.kv.base import KVMethod, keep_last
from workbench.registry import Fidelity, Paper, param, register
from workbench.trace import LayerTrace

_OPEN = "the abstract, which is all that was read, leaves it open"


class GlobalLocal(KVMethod):
    """Score positions by the attention received from all queries and, as much, by that from the last ones."""

    window: int = param(
        32, ge=1, le=1024, unit="tokens", help="last queries that give the local score, and stay", own=_OPEN
    )

    def score(self, layer: LayerTrace) -> Tensor:
        everywhere = layer.received()  # [k, n]
        lately = layer.attention(last=self.window).sum(dim=(1, 2))
        older = max(layer.tokens - self.window, 0)
        score = sum(
            part / part[:, :older].mean(dim=1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
            for part in (everywhere, lately)
        )
        assert isinstance(score, Tensor)
        return keep_last(score, self.window)


@register
class EMS(GlobalLocal):
    """Evict what no head needs, and merge what is redundant into the most similar of what stays.

    The Global-Local score counts the attention received from all queries, which favours early tokens, with that from
    the last `window`, which favours late ones. Then comes the head-wise Evict-then-Merge: in each head the best scores
    that fit the budget are class centres. Of the rest the best, `reach` times as many as there are centres, may be
    merged, the others are evicted. One that may joins the centre whose key has the largest cosine similarity, or, if
    that is below `threshold`, the zero class: a centre that is not kept, so that all heads merge and evict in one
    operation whatever they need. A centre becomes the mean of its members' keys and values, weighted by their scores.

    Only the abstract was read, so the formulas are ours: the two parts are scaled to the same mean over
    the positions before the window and added; keys are compared and merged as they are cached, after the rotary
    embedding; the window, which always stays, takes nothing in; scores of other methods, where some are negative,
    weigh from the smallest. The prompt is compressed once; while decoding the cache grows.
    """

    key = "ems"
    title = "EMS"
    paper = Paper(
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance",
        "Li et al. 2024",
        "2412.08521",
    )
    claim = "+1.28 on LongBench with 256 tokens; 95 % of needles found in less than 2 % of the cache"
    fidelity = Fidelity(
        "reconstructed from the abstract", "how global and local scores mix, what may be merged and with what weights"
    )
    default_budget = 0.5

    reach: float = param(1.0, ge=0, le=16, help="how many entries may be merged, for each that is kept", own=_OPEN)
    merge_keys: bool = param(
        True, help="merge keys as well as values; without it centres keep their own keys", own=_OPEN
    )
    threshold: float = param(0.9, ge=-1, le=1, help="similarity below which an entry goes to the zero class", own=_OPEN)

    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        similarity, home = nearest_kept(layer.keys, kept)
        candidates = scores.masked_fill(kept, -torch.inf)
        limits = (self.reach * kept.sum(dim=1)).long()  # [k]
        place = candidates.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        joins = ~kept & (place < limits[:, None]) & (similarity >= self.threshold)

        tokens, slots = layer.tokens, torch.arange(layer.tokens, device=home.device)
        classes = torch.where(kept, slots, torch.where(joins, home, tokens))  # [k, n], the zero class behind the last
        finite = scores.isfinite()
        lowest = torch.where(finite, scores, torch.inf).amin(dim=1, keepdim=True).clamp_max(0)
        weight = torch.where(finite, scores - lowest, 0.0)
        exact = pad(scores == torch.inf, (0, 1))  # centres that are certain take nothing in
        weight = weight.masked_fill(exact.gather(1, classes) & ~kept, 0.0)
        total = torch.zeros(len(kept), tokens + 1, device=home.device).scatter_add_(1, classes, weight)[:, :tokens]
        members = torch.zeros_like(total).scatter_add_(1, home, (joins & (weight > 0)).to(total.dtype))
        merged = (members > 0)[..., None]

        def mean(x: Tensor) -> Tensor:
            sums = torch.zeros(len(kept), tokens + 1, x.shape[2], device=x.device)
            sums.scatter_add_(1, classes[..., None].expand_as(x), weight[..., None] * x)
            return torch.where(merged, sums[:, :tokens] / total[..., None], x)

        return mean(layer.keys.float()) if self.merge_keys else layer.keys, mean(layer.values.float())
