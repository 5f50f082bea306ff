"""StreamingLLM."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace


@register
class StreamingLLM(SinksAndRecent):
    """Keep the first tokens, where attention sinks, and the most recent ones.

    The rolling cache of section 3.2: sinks first, then by recency; while decoding, a new token pushes out the oldest
    one that is not a sink. Positions are counted within the cache and not in the text: what is kept closes up, so that
    no distance is larger than the cache and a stream may outgrow the model's context. Only where nothing is dropped do
    they agree with the text's own. `positions="text"` lets every token keep its own, as other methods do.
    """

    key = "streaming-llm"
    title = "StreamingLLM"
    paper = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al. 2023", "2309.17453")
    claim = "four sinks and a window keep perplexity stable over 4 million tokens"
    default_budget = 0.5
    evicts_by_position = True
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "chat",
            "mit-han-lab/streaming-llm, examples/run_streaming_llama.py and enable_streaming_llm.py, b67bb6d",
            sinks=4,
            positions="cache",
            decode=True,
        ),
        Preset("perplexity", "mit-han-lab/streaming-llm, streaming_llm/utils.py, d729b3f", sinks=1),
    )

    positions: Literal["cache", "text"] = param(
        "cache", help="where entries stand: by place in the cache, or in the text"
    )
    decode: bool = param(True, help="also evict while decoding, so that the cache never grows")

    @property
    def evicts_while_decoding(self) -> bool:
        return self.decode

    @property
    def closes_up(self) -> bool:
        return self.positions == "cache"

    def score(self, layer: LayerTrace) -> Tensor:
        return super().score(layer)  # the whole method: its own, so that it does not yield to another scorer

    def evict(self, state: Tensor, positions: Tensor, room: int) -> Tensor:
        last = torch.iinfo(positions.dtype).max
        order = torch.where(positions >= self.sinks, positions, last - 1 - positions.clamp_min(0))
        return order.masked_fill(positions < 0, last).topk(room, dim=1, largest=False).indices
