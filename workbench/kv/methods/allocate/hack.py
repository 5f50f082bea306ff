"""HACK."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.core.apportion import apportion
from workbench.core.attention_rows import attention_rows
from workbench.kv.base import KVMethod, Study, keep_first, keep_last
from workbench.kv.ranking import Ranking
from workbench.measure.head_classes import contextual
from workbench.measure.head_queries import probe_positions
from workbench.registry import Fidelity, Paper, param, register
from workbench.trace import LayerTrace

_TEXT = "stands for what text has not: scales of an image"
_UNREAD = "no source was to be read: own choice"


@register
class HACK(KVMethod):
    """Tell heads that look at the same few tokens from heads that look around them, and treat each kind its own way.

    The attention of `probes` queries has, for each head, a variance over the queries in every column; the sum over the
    columns is small for contextual heads (vertical patterns) and large for structural ones (diagonal patterns). The
    `contextual` share of all heads with the smallest are contextual: they get `contextual_room` of an equal split, and
    the structural heads share what that leaves, so that the average stays. Contextual heads keep what the probes
    attend to most; structural heads keep the first `first` and the last `recent` positions whatever happens, and fill
    up by the probes' attention.

    On text: the first and last positions stand for the first two scales and the latest one; probes are spread evenly
    over the second half of the prompt, its last token included; heads are told apart on the prompt itself and not on
    50 samples; a KV head has the mean variance of its query heads. Merging what contextual heads drop, which the paper
    does at the last scale only, is left to the merging methods: with LOOK-M's, three needles in 512 tokens lose 0.81
    nats at half the cache of smollm2-135m, without 0.94.
    """

    key = "hack"
    title = "HACK"
    paper = Paper(
        "Head-Aware KV Cache Compression for Efficient Visual Autoregressive Modeling", "Qin et al. 2025", "2504.09261"
    )
    claim = "50-70 % less cache at near-lossless quality of visual autoregressive models"
    fidelity = Fidelity(
        "deviates",
        "on text, heads told apart on the prompt itself; what is dropped is merged only with look-m beside it",
    )
    default_budget = 0.5
    head_adaptive = True

    probes: int = param(
        32, ge=1, le=1024, unit="tokens", help="queries by which heads and positions are judged", own=_TEXT
    )
    contextual: float = param(0.5, ge=0, le=1, help="share of the heads that count as contextual", own=_UNREAD)
    contextual_room: float = param(
        0.4, gt=0, le=1, help="what a contextual head gets, as a share of an equal split", own=_UNREAD
    )
    first: int = param(
        4, ge=0, le=1024, unit="tokens", help="first positions that structural heads always keep", own=_TEXT
    )
    recent: int = param(
        32, ge=1, le=4096, unit="tokens", help="last positions that structural heads always keep", own=_TEXT
    )

    def scores(self, study: Study) -> Tensor:
        probed = self._probed(study)
        kinds = contextual(stacked([variance for variance, _ in probed]), self.contextual)  # [l, k]
        scores = []
        for (_, votes), vertical in zip(probed, kinds, strict=True):
            structural = keep_last(keep_first(votes, self.first), min(self.recent, study.trace.tokens))
            scores.append(torch.where(vertical[:, None].to(votes.device), votes, structural))
        return stacked(scores)

    def importance(self, study: Study) -> Tensor:
        """The variance of each head's attention over the probes, summed over positions, float32 [l, k]."""
        return stacked([variance for variance, _ in self._probed(study)]).cpu()

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        variance, number = ranking.importance, ranking.layers * ranking.kv_heads
        total = min(entries, number * ranking.tokens)
        if variance is None or total < number:
            return super().allocate(ranking, entries)
        vertical = contextual(variance, self.contextual)
        least = max(int(self.contextual_room * (total // number)), 1)
        if bool(vertical.all()):
            least = total // number
        room = torch.where(vertical, least, 0)
        most = torch.where(vertical, 0, ranking.tokens)
        structural = apportion(total - int(room.sum()), (~vertical).double(), most)
        # What structural heads cannot use, because the prompt is short, goes back.
        back = apportion(
            total - int((room + structural).sum()), vertical.double(), torch.where(vertical, ranking.tokens - least, 0)
        )
        return room + structural + back

    def _probed(self, study: Study) -> list[tuple[Tensor, Tensor]]:
        """Of each compressible layer, variances [k] and the attention that positions received from probes [k, n]."""
        key = ("hack", self.probes)
        return study.trace.once(key, lambda: [self._probe(layer) for layer in study.trace.compressible])

    def _probe(self, layer: LayerTrace) -> tuple[Tensor, Tensor]:
        positions = probe_positions(layer.tokens, self.probes).to(layer.device)
        blocks = attention_rows(layer.queries[:, positions], layer.keys, layer.scoring, query_positions=positions)
        rows = torch.cat([block for _, block in blocks], dim=1).unflatten(0, (layer.kv_heads, -1))  # [k, g, probes, n]
        variance = rows.var(dim=2, correction=0).sum(dim=-1).mean(dim=1)
        return variance, rows.sum(dim=(1, 2))
