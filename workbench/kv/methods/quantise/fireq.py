"""FireQ, the part that concerns the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.smoothed import SmoothedFormat
from workbench.registry import Paper, param, register


@register
class FireQ(KVMethod):
    """Keep every token at 4 bits, with outliers of the keys smoothed along rotary pairs and queries in FP8.

    Before rotation, the two channels of a rotary pair are multiplied by a common factor that brings the pair's largest
    length to 8, which the rotation leaves alone; after it, the few channels that are still the largest, and their
    partners, get factors of their own instead (attention layers' outlier smoothing; factors, 8 and the number of
    channels as in the authors' code). Queries are divided by the same factors. Keys and values are rounded to
    symmetric INT4, for each token and head in groups of channels with an FP8 scale; queries to FP8 with a scale for
    each token and head. New tokens are quantised as they enter: nothing stays exact.

    The factors come from the prompt itself instead of a calibration set. Values of a head are brought to the same
    range by one factor, so that FP8 scales do not underflow. FP8 is emulated: products are formed in the model's
    precision. The budget chooses "auto" bits: the uncompressed cache where it fits, else 8 (our addition, with
    bfloat16 scales), else 4, as published and without a budget. INT4 weights and FP8 activations of the linear layers
    are no part of this method.
    """

    key = "fireq"
    title = "FireQ"
    paper = Paper(
        "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration",
        "Baek et al. 2025",
        "2505.20839",
    )
    claim = "1.68 times faster feed-forward and 1.26 times faster prefill than QServe, with INT4 weights and cache"
    of_entries = True

    bits: Literal["auto", 4, 8] = param("auto", help="bits of each number, or the most that fit into the budget")
    group: int = param(128, ge=4, le=256, unit="channels", help="how many numbers of a token share a scale")
    outliers: int = param(8, ge=0, le=256, unit="channels", help="channels of a head smoothed on their own")
    fp8_query: bool = param(True, help="round queries to FP8 before they meet the keys")

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is None:
            return self._smoothed(4 if self.bits == "auto" else self.bits)
        return first_fitting(self._formats(dtype), shapes, limit)

    def _formats(self, dtype: torch.dtype) -> Iterator[Format]:
        """What a budget may choose from, best first."""
        if self.bits == "auto":
            yield DenseFormat(dtype)
        for bits in (8, 4) if self.bits == "auto" else (self.bits,):
            yield self._smoothed(bits)

    def _smoothed(self, bits: int) -> SmoothedFormat:
        return SmoothedFormat(bits, self.group, self.outliers, self.fp8_query)
