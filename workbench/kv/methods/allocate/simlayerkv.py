"""SimLayerKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.kv.base import KVMethod, Study, keep_first
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class SimLayerKV(KVMethod):
    """Leave only the first and last tokens in lazy layers, and everything in the others.

    A layer is the lazier the more of the last queries' attention goes to the first `sinks` and last `recent` tokens
    (section 3.2); where it is more than `threshold`, only these stay. A budget takes as many layers as it needs
    instead, the laziest first; the last of them keeps as many of its recent tokens as there is room for.
    """

    key = "simlayerkv"
    title = "SimLayerKV"
    paper = Paper(
        "SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction", "Zhang et al. 2024", "2410.13846"
    )
    claim = "five times less cache with 4 bit quantisation, 1.2 % quality lost"
    fidelity = Fidelity("deviates", "with a budget, as many layers are lazy as it needs")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, presses/simlayerkv_press.py; 0.9 is its advice for Llama 3, 8bb29b9",
            threshold=0.9, last=1, sinks=4, recent=1024,
        ),
    )  # fmt: skip

    threshold: float = param(0.9, ge=0, le=1, help="attention to first and last tokens beyond which a layer is lazy")
    last: int = param(1, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that are looked at")
    sinks: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the beginning that lazy layers keep")
    recent: int = param(1024, ge=1, le=65536, unit="tokens", help="tokens at the end that lazy layers keep")

    def score(self, layer: LayerTrace) -> Tensor:
        later = torch.arange(layer.tokens, device=layer.device).float().expand(layer.kv_heads, -1)
        return keep_first(later, self.sinks)

    def importance(self, study: Study) -> Tensor:
        """How lazy each layer is, float64 [l], 0 to 1."""
        return stacked([self._laziness(layer) for layer in study.trace.compressible]).double().cpu()

    def wanted(self, ranking: Ranking) -> int | None:
        lazy = 0 if ranking.importance is None else int((ranking.importance > self.threshold).sum())
        few = self._few(ranking)
        return ranking.kv_heads * (ranking.layers * ranking.tokens - lazy * (ranking.tokens - few))

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        few, tokens = self._few(ranking), ranking.tokens
        each = entries // ranking.kv_heads
        if ranking.importance is None or each < ranking.layers * few:
            return super().allocate(ranking, entries)
        spare, counts = each - ranking.layers * few, torch.full((ranking.layers,), few)
        for layer in ranking.importance.argsort(stable=True).tolist():  # the least lazy first
            counts[layer] += min(spare, tokens - few)
            spare -= int(counts[layer]) - few
        return counts[:, None].expand(-1, ranking.kv_heads)

    def _few(self, ranking: Ranking) -> int:
        """How many tokens a lazy layer keeps."""
        return min(self.sinks + self.recent, ranking.tokens)

    def _laziness(self, layer: LayerTrace) -> Tensor:
        rows = layer.attention(last=self.last).mean(dim=(0, 1, 2))  # [n]
        if self.sinks + self.recent >= layer.tokens:
            return rows.sum()
        return rows[: self.sinks].sum() + rows[-self.recent :].sum()
