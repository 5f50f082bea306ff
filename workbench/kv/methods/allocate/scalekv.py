"""ScaleKV."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.core.apportion import apportion
from workbench.kv.base import Study
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class ScaleKV(SnapKV):
    """Give layers whose attention is spread out (drafters) much room, and layers that look close by (refiners) little.

    A layer's attention selectivity index is the share of attention that its queries of the map in hand pay to that map,
    times the sum of their `selective` largest weights on the history before it, each averaged over heads and queries
    (equation 2). The `drafters` share of the layers with the lowest index are drafters (equation 3); refiners get
    `refiner_room` of an equal split and drafters share what that leaves (equation 4). What a layer keeps is decided by
    the attention of the last `window` tokens, pooled (equation 5).

    On text there is one scale, and the map in hand is the last `current` tokens; layers are told apart on the prompt
    itself instead of ten calibration prompts, and ranked as by Z-scores, which keep the order within one scale. The
    observation window is the last tokens instead of the centres of patches, and its scores go through the softmax,
    which the released code leaves out. Shares are those of the authors' configurations. What drafters cannot use
    because the prompt is short goes back to the refiners.
    """

    key = "scalekv"
    title = "ScaleKV"
    paper = Paper(
        "Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression",
        "Li et al. 2025",
        "2505.19602",
    )
    claim = "10 % of the cache keeps pixel-level fidelity of visual autoregressive models"
    fidelity = Fidelity(
        "deviates", "on text: one scale, the last tokens as the map in hand, layers told apart on the prompt"
    )
    presets = (
        Preset(
            "infinity-2b", "StargazerX0/ScaleKV, infer_2b.py and budgets/2b_10%_budget.json (scale 12), eb0615a",
            window=16, kernel=5, pooling="max", drafters=0.0625, refiner_room=0.65,
        ),
        Preset(
            "infinity-8b", "StargazerX0/ScaleKV, budgets/8b_10%_budget.json (scale 12), eb0615a",
            window=16, kernel=5, pooling="max", drafters=0.075, refiner_room=0.58,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(16, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    kernel: int = param(5, ge=1, le=63, odd=True, unit="tokens", help="width of the pooling along the sequence")
    current: int = param(
        64, ge=1, le=1024, unit="tokens", help="the end of the prompt that stands for the map in hand",
        own="text has no maps",
    )  # fmt: skip
    selective: int = param(
        16, ge=1, le=1024, unit="tokens", help="how many of the history's largest weights count",
        own="the code ships the layers that it found, not how",
    )  # fmt: skip
    drafters: float = param(0.0625, ge=0, le=1, help="share of the layers that are drafters, at least one")
    refiner_room: float = param(0.65, ge=0, le=1, help="what a refiner gets, as a share of an equal split")

    def importance(self, study: Study) -> Tensor:
        """The attention selectivity index of each compressible layer, float32 [l]."""
        return stacked([self._selectivity(layer) for layer in study.trace.compressible]).cpu()

    def _selectivity(self, layer: LayerTrace) -> Tensor:
        rows = layer.attention(last=self.current)  # [k, g, q, n]
        history = layer.tokens - rows.shape[2]
        near = rows[..., history:].sum(dim=-1).mean()
        far = rows[..., :history].topk(min(self.selective, history), dim=-1).values.sum(dim=-1).mean()
        return near * far

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        layers, tokens = ranking.layers, ranking.tokens
        total = min(entries // ranking.kv_heads, layers * tokens)  # over all layers, for one head
        if ranking.importance is None or total < layers:
            return super().allocate(ranking, entries)
        equal = total // layers
        refined = max(int(self.refiner_room * equal), min(self.window, equal), 1)
        number = min(max(round(self.drafters * layers), 1), layers)
        drafting = torch.zeros(layers, dtype=torch.bool)
        drafting[torch.argsort(ranking.importance, stable=True)[:number]] = True
        room = torch.where(drafting, 0, refined)
        most = torch.where(drafting, tokens, tokens - refined)
        left = total - int(room.sum())
        first = apportion(left, drafting.double(), torch.where(drafting, most, 0))
        room = room + first + apportion(left - int(first.sum()), (~drafting).double(), most - first)
        return room[:, None].expand(-1, ranking.kv_heads)
