"""Key norms."""

from __future__ import annotations

from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.registry import Paper, register
from workbench.trace import LayerTrace


@register
class Knorm(KVMethod):
    """Keep the keys of smallest length: they tend to receive the most attention.

    The score is minus the L2 norm of each key (section 3), known without any query. The paper also leaves the first
    layers uncompressed in some experiments; here all layers are treated alike.
    """

    key = "knorm"
    title = "Key norm"
    paper = Paper(
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", "Devoto et al. 2024", "2406.11430"
    )
    claim = "half the cache for language modelling, a tenth for passkeys"
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        length: Tensor = layer.keys.float().norm(dim=-1)
        return -length
