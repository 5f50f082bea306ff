"""From 16-bit to 1-bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.one_bit import OneBitFormat
from workbench.registry import Paper, param, register


@register
class VisualKV1Bit(KVMethod):
    """Keep every token, but those of one stretch, such as an image, at one bit a number.

    Group-specific: every channel of a KV head has its own two values for each `group` of consecutive tokens, keys and
    values alike. Quantile-based: these are the channel's quantiles `quantile` and 1 - quantile in the group, not its
    extremes, which few numbers come near; each number becomes the nearer one. Text, and every token of the answer,
    stays exact. The paper's abstract names both ideas but we know of no published defaults: 32 tokens and the quantile
    0.2, which is near the best pair for normally distributed numbers, are ours.

    The stretch is `length` tokens from position `start` on (counted among the tokens kept, where another method drops
    some). Without a length it is all but the newest `recent` tokens; with a budget then as few as it asks for, counted
    from `start`.
    """

    key = "vkv-1bit"
    title = "From 16-bit to 1-bit"
    paper = Paper(
        "From 16-Bit to 1-Bit: Visual KV Cache Quantization for Memory-Efficient Multimodal Large Language Models",
        "Zhang et al. 2025",
        "2502.14882",
    )
    claim = "16 times smaller on visual tokens"

    group: int = param(32, ge=8, le=1024, unit="tokens", help="how many numbers of a channel share their two values")
    quantile: float = param(0.2, ge=0, lt=0.5, help="where the two values lie; 0 is the smallest and the largest")
    start: int = param(0, ge=0, le=2**20, unit="tokens", help="first token of the stretch")
    length: int = param(0, ge=0, le=2**20, unit="tokens", help="tokens in the stretch; 0: all but the newest")
    recent: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens that stay exact where no length is set")

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if self.length:
            return self._format(dtype, recent=0)
        if limit is None:
            return self._format(dtype, self.recent)
        return first_fitting(self._formats(dtype, max(shape.tokens for shape in shapes)), shapes, limit)

    def _formats(self, dtype: torch.dtype, tokens: int) -> Iterator[Format]:
        yield DenseFormat(dtype)
        for quantised in range(self.group, tokens - self.start + 1, self.group):
            yield self._format(dtype, tokens - self.start - quantised)

    def _format(self, dtype: torch.dtype, recent: int) -> Format:
        return OneBitFormat(dtype, self.group, self.quantile, self.start, self.length or None, recent)
