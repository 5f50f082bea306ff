"""PrefixKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.accumulated_attention import AccumulatedAttention
from workbench.kv.base import keep_first, keep_last
from workbench.kv.ranking import Ranking
from workbench.registry import Paper, param, register
from workbench.trace import LayerTrace


class SharedAttention(AccumulatedAttention):
    """Score positions by the attention they received from all queries, averaged over the heads of a layer."""

    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    recent: int = param(1, ge=1, le=1024, unit="tokens", help="tokens at the end that always stay")

    def score(self, layer: LayerTrace) -> Tensor:
        mean = super().score(layer).sum(dim=0, keepdim=True) / layer.heads
        return keep_last(keep_first(mean.expand(layer.kv_heads, -1), self.sinks), self.recent)


@register
class PrefixKV(SharedAttention):
    """Give each layer as many positions as it takes to hold the same share of its importance in all layers.

    The best c positions of a layer hold P(c) of its importance, its scores sorted, normalised and cumulated. One
    global prefix configuration p, the same for all layers, fixes how many positions each keeps, the fewest that reach
    p; the paper finds the p that meets the budget by binary search. Here the p at which each position joins is put in
    order once, so that a size is looked up, the same one, and met to the position. The heads of a layer have one size.

    Scores are the paper's, accumulated attention averaged over heads, with the sinks and the last token always kept
    (on plain text raise `recent`: queries look back a few tokens), or those of any other scorer in the recipe. P is
    the mean over the heads, of scores counted from the smallest where some are negative; what is certain to stay comes
    first and counts nothing. The authors' code may take sizes found on other prompts; here every prompt has its own.
    """

    key = "prefixkv"
    title = "PrefixKV"
    paper = Paper(
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
        "Wang et al. 2024",
        "2412.03409",
    )
    claim = "best quality for a given total budget"
    default_budget = 0.5

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        total = min(entries // ranking.kv_heads, ranking.layers * ranking.tokens)  # over all layers, of one head
        limits = torch.full((ranking.layers, 1), total, device=ranking.in_prefix.device)
        return torch.searchsorted(ranking.in_prefix, limits).expand(-1, ranking.kv_heads)
