"""MiKV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from workbench.kv.accumulated_attention import AccumulatedAttention
from workbench.kv.stores.format import Format, MixedFormat, Shape
from workbench.registry import Fidelity, Paper, Preset, param, register

_OPEN = "no official code, and we could not read the paper's setting: 2 bits in groups of 32 as in KIVI"


@register
class MiKV(AccumulatedAttention):
    """Keep important tokens at full precision and all others at few bits, instead of dropping them.

    Importance is the accumulated attention, or the score of any other method in the recipe. The others are quantised
    token by token (section 3.1). Outlier channels of their keys are balanced first: multiplied by sqrt(max |query| /
    max |key|) of that channel over the prompt, and divided by it when read (section 3.2). The budget is for everything
    together, and decides how many tokens are important.

    While decoding, new tokens enter at full precision and the important token with the smallest sum of attention is
    quantised, so that the share of important ones stays as planned and the cache grows at nearly the rate of the low
    bits. What the paper leaves open is done as in H2O: sums go on growing with every pass, and the newest
    `recent_share` of the important tokens are safe (without this each new token would leave at once). The sums and
    positions are part of the budget. What was quantised never returns. Whichever method scored the prompt, demotion
    goes by attention, and each head demotes equally many at the layer's share.
    """

    key = "mikv"
    title = "MiKV"
    paper = Paper(
        "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
        "Yang et al. 2024",
        "2402.18096",
    )
    claim = "a quarter of the cache with little loss, where eviction loses details"
    fidelity = Fidelity(
        "reconstructed from the abstract", "sections 3.1 and 3.2 known from summaries; open: group, what happens later"
    )
    presets = (Preset("abstract", "title and abstract: low precision for what would be evicted", balance=True),)
    default_budget = 0.5

    low_bits: Literal[2, 4, 8] = param(2, help="bits of each number of the tokens that are not important", own=_OPEN)
    group: int = param(
        32, ge=4, le=256, unit="channels", help="how many numbers of a token share a scale and a zero", own=_OPEN
    )
    balance: bool = param(True, help="balance outlier channels of the keys before they are quantised")
    recent_share: float = param(
        0.5,
        ge=0,
        le=1,
        help="part of the important tokens, the newest, that is safe while decoding",
        own="H2O's half: the paper takes importance from it",
    )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        return MixedFormat(dtype, self.low_bits, self.group, self.balance, self.recent_share)
