"""KCache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.format import Format, Shape
from workbench.kv.stores.host_values import HostValuesFormat
from workbench.registry import Fidelity, Paper, param, register


@register
class KCache(SinksAndRecent):
    """Keep every key on the device and the values in host memory; fetch those with the largest attention.

    Scores are exact, for all keys are here; of the softmax over everything the `fetch` largest weights of a KV head
    (summed over its query heads) multiply values copied from host memory, the rest is left out and the weights stay as
    they are (section 3). Values that the budget has room for stay on the device: those of the first tokens and the
    most recent ones, or those that another method of the recipe selects.

    Keys are half of the cache, so smaller budgets are refused. Chosen here: query heads of a group fetch together, and
    while decoding the oldest values follow into host memory.
    """

    key = "kcache"
    title = "KCache"
    paper = Paper("Efficient LLM Inference with KCache", "He and Wu 2024", "2404.18057")
    claim = "40 % more throughput at the same accuracy, with half of the cache in host memory"
    default_budget = 0.6
    fidelity = Fidelity(
        "reconstructed from the abstract", "section 3 known from summaries; open: how many values, and which stay"
    )

    sinks: int = param(
        4, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay", own="StreamingLLM's four"
    )
    fetch: int = param(
        128,
        ge=1,
        le=16384,
        unit="tokens",
        help="values fetched for each query of a KV head",
        own="no official code, and we could not read the paper's N",
    )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        return HostValuesFormat(dtype, self.fetch, self.sinks)
