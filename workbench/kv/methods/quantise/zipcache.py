"""ZipCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from workbench.core.attention_rows import attention_rows
from workbench.kv.base import KVMethod
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.salient import SalientFormat
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

_PAIRS = {"8/4": (8, 4), "4/2": (4, 2)}


class ProbedAttention(KVMethod):
    """Score positions by the mean attention they got from those probe queries that can see them."""

    recent_probes: float = param(0.05, gt=0, le=1, help="part of the prompt, its end, whose queries are probes")
    random_probes: float = param(0.05, ge=0, le=1, help="part of the prompt drawn from the rest as probes")
    seed: int = param(0, ge=0, le=2**31 - 1, help="which tokens are drawn", own="the code draws anew each time")

    def score(self, layer: LayerTrace) -> Tensor:
        probes = self.probes(layer.tokens).to(layer.device)
        total = torch.zeros(layer.heads, layer.tokens, device=layer.device)
        for _, rows in attention_rows(layer.queries[:, probes], layer.keys, layer.scoring, query_positions=probes):
            total += rows.sum(dim=1)
        positions = torch.arange(layer.tokens, device=layer.device)
        observers = (probes[:, None] >= positions).sum(dim=0)  # [n]: by how many each is seen, the last token at least
        mean: Tensor = total.unflatten(0, (layer.kv_heads, -1)).mean(dim=1)
        return mean / observers

    def probes(self, tokens: int) -> Tensor:
        """Whose queries are asked, ascending positions int64 [p]: at least the last one."""
        recent = min(max(int(self.recent_probes * tokens), 1), tokens)
        earlier = tokens - recent
        drawn = torch.randperm(earlier, generator=torch.Generator().manual_seed(self.seed))
        drawn = drawn[: int(self.random_probes * tokens)].sort().values
        return torch.cat([drawn, torch.arange(earlier, tokens)])


@register
class ZipCache(ProbedAttention):
    """Keep every token at few bits, salient ones at more.

    A token is as salient as the mean of the attention it got from those probe queries that can see it (the normalised
    score of section 4.2, equation 8: a sum would favour early tokens). Probes are the last `recent_probes` of the
    prompt and as many drawn from the rest as `random_probes` says (section 4.3); the draw depends on `seed` alone, the
    same for every layer. Any other scorer of the recipe may take their place. Keys are quantised channel by channel,
    values token by token after each channel was divided by the root of its largest magnitude (section 4.1, algorithm
    1), each tier and KV head apart.

    The code divides by the number of all queries that can see a token, not of the probes: on the tiny model KL is 0.10
    and 0.15 at a quarter and a fifth of the bytes by the paper's count, 0.12 and 0.13 by the code's.

    The budget decides how many tokens are salient. Bits "auto" are 4 and 2, as published, and 8 and 4 where every
    token fits at 4 bits; the uncompressed cache where that fits. As in the published code tokens that come while
    decoding stay exact until there are `gap` of them; then those to which the newest query gave most are salient, as
    large a share as of the prompt, and the whole cache is read and quantised anew with them.
    """

    key = "zipcache"
    title = "ZipCache"
    paper = Paper(
        "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
        "He et al. 2024",
        "2405.14256",
    )
    claim = "4.98 times smaller with 0.38 % lost on GSM8k"
    fidelity = Fidelity(
        "deviates", "the budget decides how many tokens are salient; scales belong to a KV head, not to all of a layer"
    )
    presets = (
        Preset(
            "demo",
            "ThisisBillhe/ZipCache, zipcache_generation_demo.py and models/modeling_llama.py, b6932b9",
            bits="4/2",
            recent_probes=0.05,
            random_probes=0.05,
            gap=100,
        ),
    )
    default_budget = 0.25

    bits: Literal["auto", "8/4", "4/2"] = param(
        "auto",
        help="bits of salient and of other tokens",
        own="the published 4 and 2, unless a budget has room for more",
    )

    gap: int = param(
        100, ge=0, le=4096, unit="tokens", help="tokens of the answer after which all is quantised anew; 0: never"
    )

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if self.bits != "auto":
            return SalientFormat(dtype, *_PAIRS[self.bits], self.gap)
        if limit is not None:
            if sum(shape.full_nbytes for shape in shapes) <= limit:
                return DenseFormat(dtype)
            wide = SalientFormat(dtype, *_PAIRS["8/4"], self.gap)
            least = (wide.nbytes(shape, torch.ones(1, shape.kv_heads, dtype=torch.long)) for shape in shapes)
            if sum(least) <= limit:  # one salient token a head
                return wide
        return SalientFormat(dtype, *_PAIRS["4/2"], self.gap)
