"""Mustafar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting, halvings, pruning_steps
from workbench.kv.stores.bitmap import BitmapFormat
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class Mustafar(KVMethod):
    """Keep every token, but of its key and its value only the largest numbers, packed behind a bitmap.

    Within each token and KV head the smallest magnitudes go, the same share from keys and values (section 2,
    per-token magnitude pruning); what stays lies packed, with one bit a channel that says where it belongs (section
    3). The newest `recent` tokens are whole and are pruned as they leave that window, also while decoding.

    With a budget, "auto" prunes as little as fits and shortens the window where that is not enough; without one it
    prunes 70 %. The published kernel pads each run of numbers to a multiple of eight, this store does not.
    """

    key = "mustafar"
    title = "Mustafar"
    paper = Paper(
        "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
        "Joo et al. 2025",
        "2505.22913",
    )
    claim = "70 % of the numbers pruned, the cache at 45 %, 2.23 times the throughput"
    fidelity = Fidelity("as published")
    presets = (
        Preset("speed test", "dhjoo98/mustafar, mem_spd_test.py and long_test.sh, d83ee7e", sparsity=70, recent=32),
        Preset("arguments", "dhjoo98/mustafar, utils/process_args.py, a8fad80", sparsity=50, recent=128),
    )
    of_entries = True

    sparsity: Literal["auto", 30, 40, 50, 60, 70, 80, 90] = param(
        "auto",
        unit="%",
        help="share of a token's numbers that go, or as few as the budget asks for",
        own="a budget decides; without one it is the published 70",
    )
    recent: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens that stay whole")

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is None:
            return BitmapFormat(dtype, (70 if self.sparsity == "auto" else self.sparsity) / 100, self.recent)
        widest = max(max(shape.key_width, shape.value_width) for shape in shapes)
        return first_fitting(self._formats(dtype, widest), shapes, limit)

    def _formats(self, dtype: torch.dtype, widest: int) -> Iterator[Format]:
        if self.sparsity != "auto":
            for recent in halvings(self.recent):
                yield BitmapFormat(dtype, self.sparsity / 100, recent)
            return
        yield DenseFormat(dtype)
        for pruned, recent in pruning_steps(widest, self.recent):
            yield BitmapFormat(dtype, pruned, recent)
