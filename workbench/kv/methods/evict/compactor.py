"""Compactor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from workbench.core.across_devices import stacked
from workbench.kv.base import KVMethod, Study
from workbench.kv.leverage import leverage, standardised
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_RIDGE = 1e-2  # of the products of sketched keys, as in the authors' code


@register
class Compactor(KVMethod):
    """Keep what stands out by geometry and what its own chunk attends to, whatever will be asked.

    A key stands out by its leverage among the keys before rotation, in a random sketch (section 3.1). Attention is not
    causal, within chunks of `chunk` tokens, summed over queries, weighted by the length of the values and smoothed over
    three tokens. Both are standardised; leverage weighs `blend` beside attention, by default the share that goes. The
    first and last tokens always stay.
    """

    key = "compactor"
    title = "Compactor"
    paper = Paper(
        "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        "Chari & Van Durme 2025",
        "2507.08143",
    )
    claim = "full quality on LongBench at 63 % less cache"
    fidelity = Fidelity("deviates", "the budget is the user's and not calibrated for each context")
    presets = (
        Preset(
            "kvpress", "NVIDIA/kvpress, the authors': presses/compactor_press.py, leverage_press.py and "
            "non_causal_attention_press.py, 0.5.5", first=8, last=4, chunk=256, sketch=48, blend=0.0,
        ),
    )  # fmt: skip
    default_budget = 0.5

    first: int = param(8, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    last: int = param(4, ge=0, le=256, unit="tokens", help="tokens at the end that always stay")
    chunk: int = param(256, ge=2, le=8192, unit="tokens", help="length of the chunks that attend within")
    sketch: int = param(48, ge=1, le=1024, help="dimensions of the random sketch")
    blend: float = param(0.0, ge=0, le=1, help="weight of leverage beside attention; 0: the share that goes")

    @property
    def scores_by_layer(self) -> bool:
        return False  # leverage comes besides, and attention within chunks needs every token's query

    def score(self, layer: LayerTrace) -> Tensor:
        return self._whole(self._attended(layer), layer)

    def scores_at(self, study: Study, scores: Tensor, share: float) -> Tensor:
        weight = self.blend or 1 - share
        return scores + weight * study.trace.once(("compactor", self.parameter_key()), lambda: self._outliers(study))

    def _outliers(self, study: Study) -> Tensor:
        """How far keys stand out, standardised in each layer: [l, k, n]; 0 for what stays anyway."""
        found = []
        for layer in study.trace.compressible:
            keys = layer.rotation.undo(layer.keys.float(), torch.arange(layer.tokens, device=layer.device))
            inside = standardised(leverage(keys[:, self._inside(layer)], self.sketch, _RIDGE))
            found.append(pad(inside, self._outside(layer)))
        return stacked(found)

    def _attended(self, layer: LayerTrace) -> Tensor:
        """What positions are attended to by their chunk, standardised: [k, m] of those that do not stay anyway."""
        inside = self._inside(layer)
        sums = [
            received(queries, keys) for queries, keys in zip(
                layer.queries[:, inside].unflatten(0, (layer.kv_heads, -1)).split(self.chunk, dim=2),
                layer.keys[:, None, inside].split(self.chunk, dim=2),
                strict=True,
            )
        ]  # fmt: skip
        weighted = torch.cat(sums, dim=-1).mean(dim=1) * layer.values[:, inside].float().norm(dim=-1)
        return standardised(avg_pool1d(weighted, 3, stride=1, padding=1))

    def _outside(self, layer: LayerTrace) -> tuple[int, int]:
        """How many positions stay anyway at the beginning and at the end, one at least being left between."""
        first = min(self.first, layer.tokens - 1)
        return first, min(self.last, layer.tokens - first - 1)

    def _inside(self, layer: LayerTrace) -> slice:
        first, last = self._outside(layer)
        return slice(first, layer.tokens - last)

    def _whole(self, scores: Tensor, layer: LayerTrace) -> Tensor:
        return pad(scores, self._outside(layer), value=torch.inf)


def received(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of queries [k, g, c, d] to keys [k, 1, c, d], unmasked and unscaled, summed over queries: [k, g, c].

    Unscaled as in the authors' code.
    """
    found: Tensor = (queries.float() @ keys.float().mT).softmax(dim=-1).sum(dim=-2)
    return found
