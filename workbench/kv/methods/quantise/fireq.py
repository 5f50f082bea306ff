"""FireQ, the part that concerns the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.smoothed import SmoothedFormat
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class FireQ(KVMethod):
    """Keep every token at 4 bits, with outliers of the keys smoothed along rotary pairs and queries in FP8.

    Before rotation, the two channels of a rotary pair are multiplied by a common factor that brings the pair's largest
    length to 8, which the rotation leaves alone; after it, the few channels that are still the largest, and their
    partners, get factors of their own instead (attention layers' outlier smoothing; factors, 8 and the number of
    channels as in the authors' code). Queries are divided by the same factors. Keys and values are rounded to
    symmetric INT4, for each token and head in groups of channels, a head that is narrower than a group in one of its
    own; queries to FP8 with a scale for each token and head. Scales are bfloat16, as in all cache configurations of the
    authors' code, or FP8, the default of its fields. New tokens are quantised as they enter: nothing stays exact.

    The factors come from the prompt itself instead of a calibration set. Values of a head are brought to the same
    range by one factor, so that FP8 scales do not underflow. FP8 is emulated: products are formed in the model's
    precision. The budget chooses "auto" bits: the uncompressed cache where it fits, else 8 (our addition, scales always
    bfloat16), else 4, as published and without a budget. INT4 weights and FP8 activations of the linear layers are no
    part of this method.
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

    fidelity = Fidelity("deviates", "factors come from the prompt, not from a calibration set; the cache's part alone")
    presets = (
        Preset(
            "script",
            "llm-fireq/fireq, examples/quant_model_i4_f8.sh and the YAML file that it names, c3d87b0",
            bits=4,
            group=128,
            outliers=8,
            fp8_query=True,
            scales="bfloat16",
        ),
        Preset("fields", "llm-fireq/fireq, mcomp/config/configs.py, c3d87b0", outliers=3, scales="fp8"),
    )

    bits: Literal["auto", 4, 8] = param(
        "auto",
        help="bits of each number, or the most that fit into the budget",
        own="a budget decides; without one it is the published 4",
    )
    group: int = param(128, ge=4, le=256, unit="channels", help="how many numbers of a token share a scale")
    outliers: int = param(8, ge=0, le=256, unit="channels", help="channels of a head smoothed on their own")
    fp8_query: bool = param(True, help="round queries to FP8 before they meet the keys")
    scales: Literal["bfloat16", "fp8"] = param("bfloat16", help="what the scale of 4-bit numbers is stored as")

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
        scales = torch.float8_e4m3fn if self.scales == "fp8" and bits == 4 else torch.bfloat16
        return SmoothedFormat(bits, self.group, self.outliers, self.fp8_query, scales)
