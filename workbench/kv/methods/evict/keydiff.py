"""KeyDiff."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from workbench.kv.base import KVMethod
from workbench.registry import Fidelity, Paper, register
from workbench.trace import LayerTrace


@register
class KeyDiff(KVMethod):
    """Keep the keys that differ most from the others.

    The score is minus the cosine similarity of each key to the mean of all normalised keys, the anchor of section 3.
    The paper evicts block by block while a long prompt is read; here the whole prompt is scored at once. With
    smollm2-135m at half the cache, three needles in 512 tokens lose 0.032 nats so, and 0.034 where blocks of 128 are
    scored in turn.
    """

    key = "keydiff"
    title = "KeyDiff"
    paper = Paper(
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference",
        "Park et al. 2025",
        "2504.15364",
    )
    claim = "a 23 % smaller cache within 0.04 % of full quality on LongBench"
    fidelity = Fidelity("deviates", "the prompt is scored at once, not by blocks of 128 as it is read")
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        keys = layer.keys.float()
        anchor = normalize(keys, dim=-1).mean(dim=1, keepdim=True)  # [k, 1, d]
        return -cosine_similarity(keys, anchor, dim=-1)
