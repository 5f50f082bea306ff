"""TOVA."""

from __future__ import annotations

from torch import Tensor

from workbench.kv.base import KVMethod, keep_last
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class TOVA(KVMethod):
    """Keep what the newest token attends to, averaged over all heads of a layer.

    All heads of a layer keep the same positions (section 3.2). While decoding, the entry to which the newest query
    gave the least attention makes room for the next token. Nothing is protected, neither sinks nor recent tokens;
    only when the prompt is compressed its very last token, which decides, stays itself.
    """

    key = "tova"
    title = "TOVA"
    paper = Paper("Transformers are Multi-State RNNs", "Oren et al. 2024", "2401.06104")
    claim = "an eighth of the cache is nearly on par with all of it"
    fidelity = Fidelity("as published")
    presets = (Preset("code", "schwartz-lab-NLP/TOVA, src/tova_cache.py, 9c7d09b", decode=True),)
    default_budget = 0.5
    evicts_layerwise = True

    decode: bool = param(True, help="also evict while decoding, so that the cache never grows")

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    def score(self, layer: LayerTrace) -> Tensor:
        return keep_last(self.eviction_state(layer), 1)

    def eviction_state(self, layer: LayerTrace) -> Tensor:
        return self._newest(layer.attention(last=1))

    def update_state(self, state: Tensor, weights: Tensor) -> Tensor:
        return self._newest(weights)

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        return state.topk(room, dim=1, largest=False).indices

    @staticmethod
    def _newest(weights: Tensor) -> Tensor:
        """The attention of the last query, [k, m] equal in all heads, from rows [k, g, q, m]."""
        return weights[:, :, -1].mean(dim=(0, 1)).expand(weights.shape[0], -1)
