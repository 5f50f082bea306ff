"""CAKE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from workbench.core.across_devices import stacked
from workbench.core.apportion import apportion
from workbench.kv.base import KVMethod, Study, keep_last
from workbench.kv.ranking import Ranking
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class CAKE(KVMethod):
    """Share a cake of entries among layers by how widely they attend and how much that changes.

    A layer's preference is H^(1 / tau1) · V^(1 / tau2), of the entropy of the last `window` queries' attention to what
    is before them and of its variance over these queries, summed (section 4.1). Layers get room in proportion, beyond
    the window that all keep. Within a layer a token scores by the mean of that attention plus `gamma` times its
    variance, pooled over five tokens, averaged over a group's queries (section 4.3): what is attended to only sometimes
    stays too.
    """

    key = "cake"
    title = "CAKE"
    paper = Paper(
        "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", "Qin et al. 2025", "2503.12491"
    )
    claim = "3.2 % of the cache keeps LongBench quality"
    fidelity = Fidelity("deviates", "the prompt is read whole; sizes are those that cascading arrives at")
    presets = (
        Preset(
            "code", "antgroup/cakekv: experiments/LongBench/pred_cake.py, defaults for models not in model2tau.json, "
            "copy qtris123/cakekv 351be14", window=32, tau1=1.0, tau2=1.0, gamma=200.0,
        ),
        Preset(
            "llama-3.1-8b", "antgroup/cakekv: experiments/LongBench/config/model2tau.json at 1,024 entries, "
            "copy qtris123/cakekv 351be14", tau1=1.6, tau2=0.4,
        ),
        Preset(
            "mistral-7b", "antgroup/cakekv: experiments/LongBench/config/model2tau.json at 1,024 entries, "
            "copy qtris123/cakekv 351be14", tau1=0.8, tau2=0.5,
        ),
        Preset(
            "qwen2.5-7b", "antgroup/cakekv: experiments/LongBench/config/model2tau.json at 1,024 entries, "
            "copy qtris123/cakekv 351be14", tau1=1.5, tau2=0.6,
        ),
    )  # fmt: skip
    default_budget = 0.5

    window: int = param(32, ge=2, le=1024, unit="tokens", help="queries at the end of the prompt that vote")
    tau1: float = param(1.0, gt=0, le=10, help="root of the entropy in a layer's preference")
    tau2: float = param(1.0, gt=0, le=10, help="root of the variance in a layer's preference")
    gamma: float = param(200.0, ge=0, le=1e4, help="weight of the variance of a token's attention beside its mean")

    def score(self, layer: LayerTrace) -> Tensor:
        votes = self._votes(layer)  # [k, g, q, m]
        found = (votes.mean(dim=2) + self.gamma * changes(votes)).flatten(0, 1)
        pooled = avg_pool1d(found, 5, stride=1, padding=2).view(votes.shape[0], votes.shape[1], -1).mean(dim=1)
        return keep_last(pad(pooled, (0, layer.tokens - pooled.shape[1])), self.window)

    def importance(self, study: Study) -> Tensor:
        """The preference of each layer, float64 [l]."""
        layers = study.trace.compressible
        track = study.progress.track(layers, "preferences of layers", len(layers))
        return stacked([self._preference(layer) for layer in track]).double().cpu()

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        preference, tokens = ranking.importance, ranking.tokens
        total, window = entries // ranking.kv_heads, min(self.window, ranking.tokens)
        beyond = min(total, ranking.layers * tokens) - ranking.layers * window
        if preference is None or beyond <= 0:
            return super().allocate(ranking, entries)
        most = torch.full((ranking.layers,), tokens - window)
        counts = window + apportion(beyond, preference, most)
        return counts[:, None].expand(-1, ranking.kv_heads)

    def _votes(self, layer: LayerTrace) -> Tensor:
        """Attention of the last queries to what is before them, [k, g, q, m]; all of a prompt that is no longer."""
        votes = layer.attention(last=self.window)
        before = max(layer.tokens - self.window, 0)
        return votes[..., :before] if before else votes

    def _preference(self, layer: LayerTrace) -> Tensor:
        votes = self._votes(layer).double()
        entropy = -(votes * (votes + 1e-10).log()).sum()
        return entropy.clamp_min(0) ** (1 / self.tau1) * changes(votes).sum() ** (1 / self.tau2)


def changes(votes: Tensor) -> Tensor:
    """The variance of votes [k, g, q, m] over queries, [k, g, m]; 0 of one query."""
    return votes.var(dim=2) if votes.shape[2] > 1 else torch.zeros_like(votes[:, :, 0])
