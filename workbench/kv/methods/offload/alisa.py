"""ALISA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from workbench.kv.base import Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.eight_bit import EightBitOffloadFormat
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.offload import OffloadFormat
from workbench.kv.stores.recent_attention import RecentAttentionIndex
from workbench.kv.stores.recomputed import Recomputer, Recomputing
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class ALISA(SinksAndRecent):
    """Keep the newest tokens on the device; of the others fetch those that drew most attention in the last steps.

    Sparse window attention (section IV-B, algorithm 1): a step attends to k locally static tokens, the newest, and
    to as many globally dynamic ones, those with the largest sum of attention weights over the latest steps and all
    heads of the layer. Weights of tokens that a step did not attend to count as 0, so one that is left out for all
    the steps of the sum comes back only where fewer than k were not. The k newest are on the device, all others in
    host memory, from where the k dynamic ones are copied at each step (phase II of section V-A). So the budget is
    about half of the paper's caching ratio, at the bits the cache is stored at.

    Everything is stored at 8 bits (section V-B), unless all of it fits as it is. The paper rounds channel by channel;
    here each key and value has a scale and zero of its own, so that tokens can move one by one.

    Sums are over the last k steps, which takes k numbers of each token, or over `steps`; they live in host memory, and
    before the first step they are those of the prompt's last queries. Up to 16 tokens that are read together choose
    together.

    Phase III: of the entries in host memory the oldest, a share `recompute`, are deleted, and where a step chooses one
    the model reads the prompt's first tokens again for their keys and values. They come out as they were, so that this
    saves host memory, costs time and changes no result. The paper finds the share, and the step from which on it
    deletes, from times that it measured of its machine; here the share is given and holds from the first step.
    """

    key = "alisa"
    title = "ALISA"
    paper = Paper(
        "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
        "Zhao et al. 2024",
        "2403.17312",
    )
    claim = "up to 3 times FlexGen's throughput, with 80 % of the entries left out of each step"
    default_budget = 0.25
    fidelity = Fidelity(
        "deviates", "scales of a token in place of a channel; when to recompute is given, not solved for"
    )
    presets = (Preset("paper", "algorithm 1 and section V-B", sinks=0, steps=0, bits=8),)

    sinks: int = param(0, ge=0, le=256, unit="tokens", help="tokens at the beginning that always stay")
    steps: int = param(0, ge=0, le=1024, help="latest steps whose attention is summed up, at most k; 0: k")
    bits: Literal[8, 16] = param(8, help="bits of each stored number; 16: the cache's own precision")
    recompute: float = param(
        0.0,
        ge=0,
        le=0.9,
        help="part of what would lie in host memory, the oldest, that is computed again instead",
        own="the paper solves for it with its machine's times; at 0 it is its phase II, which gives the same answers",
    )

    def layout(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is not None and sum(shape.full_nbytes for shape in shapes) <= limit:
            return DenseFormat(dtype)
        index = RecentAttentionIndex(self.steps, study.trace)
        kind = EightBitOffloadFormat if self.bits == 8 else OffloadFormat
        again = None
        if self.recompute:
            again = Recomputing(
                self.recompute, Recomputer(study.reader(self.key), study.trace.ids, study.trace.prompt.images)
            )
        return kind(dtype, index, self.sinks, recomputing=again)
