"""PrefixKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.kv.accumulated_attention import AccumulatedAttention
from workbench.kv.base import Holding, KVMethod, Study, keep_first, keep_last
from workbench.kv.held import HeldLayer
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


class SharedAttention(AccumulatedAttention):
    """Score positions by the attention they received from all queries, averaged over the heads of a layer."""

    rescores = True
    evicts_by_rank = True
    grows = True

    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    recent: int = param(1, ge=1, le=1024, unit="tokens", help="tokens at the end that always stay")
    distance: int = param(25, ge=1, le=1024, unit="tokens", help="which entry leaves while decoding, from the end")
    decode: bool = param(True, help="also evict while decoding, so that a layer keeps its share of what comes")

    def shared(self, layer: LayerTrace) -> Tensor:
        """What each position received of a head on average, float32 [n]."""
        return layer.received().sum(dim=0) / layer.heads

    def score(self, layer: LayerTrace) -> Tensor:
        return keep_last(keep_first(self.shared(layer).expand(layer.kv_heads, -1), self.sinks), self.recent)

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    def leaving_at_once(self, holding: Holding) -> int:
        coming = holding.room + holding.planned - holding.entries
        came = holding.tokens + coming - holding.prompt
        return holding.entries + coming - holding.planned - came * holding.planned // holding.prompt

    def rescore(self, held: HeldLayer, scorer: KVMethod, holding: Holding) -> Tensor:
        planned = holding.planned
        first = (
            planned - self.distance if planned > self.distance else planned // 2
        )  # as the code has it for small caches
        rank = torch.arange(held.tokens, device=held.device).float()
        return rank.masked_fill(rank < min(first, held.tokens - 1), torch.inf).expand(held.kv_heads, -1)


@register
class PrefixKV(SharedAttention):
    """Give each layer as many positions as it takes to hold the same share of its importance in all layers.

    The best c positions of a layer hold P(c) of its importance: the attention that positions received, averaged over
    heads, sorted, normalised and cumulated. One global prefix configuration p, the same for all layers, fixes how many
    positions each keeps: the fewest that reach p and, as in the authors' code, as many more as there are sinks and
    last tokens. The paper finds the p that meets the budget by binary search; here the p at which each position joins
    is put in order, so that a size is looked up, the same one, and met to the position. The heads of a layer have one
    size.

    Positions are chosen by the same attention, with the sinks and the last token always kept, or by any other scorer in
    the recipe. The authors' code takes sizes found on other prompts for its results, and finds them by the same rule;
    here every prompt has its own.

    While decoding, as in that code, each layer grows by its share of what comes, and otherwise a new token pushes out
    the entry that stands where `distance` from the end was when the prompt was compressed: what is before it stays for
    good, and behind it rolls a window. With another scorer in the recipe nothing leaves.
    """

    key = "prefixkv"
    title = "PrefixKV"
    paper = Paper(
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation",
        "Wang et al. 2024",
        "2412.03409",
    )
    claim = "best quality for a given total budget"
    fidelity = Fidelity("deviates", "sizes are found on the prompt itself, not on other prompts")
    presets = (Preset("code", "THU-MIG/PrefixKV, prefixkv.py, 39b7265", sinks=4, recent=1, distance=25, decode=True),)
    default_budget = 0.5

    def importance(self, study: Study) -> Tensor:
        """The place at which each layer's best positions join, among those of all layers: int64 [l, n], ascending."""
        before = stacked([held_before(self.shared(layer)) for layer in study.trace.compressible])
        return joining(before, self.sinks + self.recent).cpu()

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        total = min(entries // ranking.kv_heads, ranking.layers * ranking.tokens)  # over all layers, of one head
        if ranking.importance is None or total < ranking.layers:
            return super().allocate(ranking, entries)
        sizes = torch.searchsorted(ranking.importance, torch.full((ranking.layers, 1), total))
        return sizes.expand(-1, ranking.kv_heads)


def held_before(importance: Tensor) -> Tensor:
    """The share of importance [n] that those before it hold, for each position from the best on: float64 [n]."""
    best_first = importance.double().sort(descending=True).values
    sums = best_first.cumsum(dim=0)
    return (sums - best_first) / sums[-1:]


def joining(before: Tensor, protected: int) -> Tensor:
    """The places at which the positions of all layers join, so that all hold the same prefix: int64 [l, n], ascending.

    before: the share held before each position, float64 [l, n], ascending. Every layer's first one and `protected` more
    come before all others, layer by layer in turns.
    """
    layers, tokens = before.shape
    certain = min(protected, tokens - 1)
    turns = torch.arange(certain, dtype=before.dtype, device=before.device).expand(layers, -1) / tokens - 1  # below 0
    joins = torch.cat([turns, before[:, : tokens - certain]], dim=1)
    order = joins.T.flatten().argsort(stable=True)  # ties in turns
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return places.view(tokens, layers).T.contiguous()
