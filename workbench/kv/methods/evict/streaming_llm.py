"""StreamingLLM."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.registry import Paper, param, register
from workbench.trace import LayerTrace


@register
class StreamingLLM(SinksAndRecent):
    """Keep the first tokens, where attention sinks, and the most recent ones.

    The rolling cache of section 3.2: sinks first, then by recency; while decoding, a new token pushes out the oldest
    one that is not a sink. The paper numbers positions by their place in the cache, so that a stream can outgrow the
    model's context; here every token keeps its true position, as for all other methods.
    """

    key = "streaming-llm"
    title = "StreamingLLM"
    paper = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al. 2023", "2309.17453")
    claim = "four sinks and a window keep perplexity stable over 4 million tokens"
    default_budget = 0.5

    decode: bool = param(True, help="also evict while decoding, so that the cache never grows")

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    def score(self, layer: LayerTrace) -> Tensor:
        return super().score(layer)  # the whole method: its own, so that it does not yield to another scorer

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        last = torch.iinfo(positions.dtype).max
        order = torch.where(positions >= self.sinks, positions, last - 1 - positions.clamp_min(0))
        return order.masked_fill(positions < 0, last).topk(room, dim=1, largest=False).indices
