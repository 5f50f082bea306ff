"""ThinK."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting, halvings, pruning_steps
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.kv.stores.pruned import PrunedFormat
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class ThinK(KVMethod):
    """Keep every token, but only those channels of its key that the last queries ask for.

    Channel j of a head scores ||q_j|| * ||k_j|| over the prompt's last `window` queries and the keys held, and the
    channels with the largest scores stay (section 3.2, equations 3 and 4); the queries of a KV head's group count
    together. The newest `recent` tokens, those of the answer and all values stay whole. Attention uses the same
    channels of the query, so the narrow keys stay narrow.

    With a budget, "auto" prunes as few channels as fit and shortens the recent part where that is not enough; without
    one it prunes 40 %, the paper's main setting. Values take half of the cache, so smaller budgets need a method that
    drops tokens beside this one, as in the paper: `SnapKV(budget=0.25) | ThinK()`.
    """

    key = "think"
    title = "ThinK"
    paper = Paper("ThinK: Thinner Key Cache by Query-Driven Pruning", "Xu et al. 2024", "2407.21018")
    claim = "over 20 % less KV memory at the same quality, 2.8 times less peak memory with KIVI"
    fidelity = Fidelity("as published")
    presets = (
        Preset(
            "longbench",
            "SalesforceAIResearch/ThinK, ThinK_eager/run_longbench.py and src/kv_pruning_utils.py, d200577",
            pruned=40,
            window=32,
            recent=32,
        ),
    )

    pruned: Literal["auto", 20, 30, 40, 50, 60, 70, 80] = param(
        "auto",
        unit="%",
        help="share of key channels that go, or as few as the budget asks for",
        own="a budget decides; without one it is the published 40",
    )
    window: int = param(32, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that score channels")
    recent: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens whose keys keep all channels")

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is None:
            pruned = 40 if self.pruned == "auto" else self.pruned
            return PrunedFormat(dtype, pruned / 100, self.recent, self.window)
        return first_fitting(self._formats(dtype, max(shape.key_width for shape in shapes)), shapes, limit)

    def _formats(self, dtype: torch.dtype, widest: int) -> Iterator[Format]:
        if self.pruned != "auto":
            for recent in halvings(self.recent):
                yield PrunedFormat(dtype, self.pruned / 100, recent, self.window)
            return
        yield DenseFormat(dtype)
        for pruned, recent in pruning_steps(widest, self.recent):
            yield PrunedFormat(dtype, pruned, recent, self.window)
