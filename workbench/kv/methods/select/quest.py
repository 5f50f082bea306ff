"""Quest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.errors import BadParameter
from workbench.kv.base import KVMethod, Study
from workbench.kv.stores.format import Shape
from workbench.kv.stores.page_bounds import PageSelection
from workbench.kv.stores.selected import Selection
from workbench.registry import Fidelity, Paper, Preset, param, register

_LEAST = 3  # pages that a query attends to at least, as in the authors' code


@register
class Quest(KVMethod):
    """Keep everything on the device, and let each new token attend only to the pages that could match its query best.

    The keys of `page` consecutive tokens are summed up by the least and the greatest number of each channel. A page's
    score is the largest product that any key within these bounds could have with the query; each query head attends to
    the `tokens` / `page` pages with the highest, three at least, in all layers but the first `dense` (section 3.3 and
    algorithm 1). Prompt and question are read with all there is.

    Nothing is saved in memory, and so there is no budget: the bounds come on top, two keys for `page` keys and values.
    What is saved is what a token reads: `decode_score_share` of a run says how many scores were computed, a page's
    bound counted as one. The page that the newest token is in competes like any other, as in the authors' evaluation
    (their kernels always take it).

    Chosen here: query heads that share a KV head choose each for itself, as in the authors' evaluation, and where
    another method of the recipe drops tokens, pages are made of those that stay.
    """

    key = "quest"
    title = "Quest"
    paper = Paper(
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", "Tang et al. 2024", "2406.10774"
    )
    claim = "attention up to 7.03 times faster with negligible loss on tasks with long dependencies"
    fidelity = Fidelity("as published")
    presets = (
        Preset("passkey", "mit-han-lab/Quest, evaluation/passkey/passkey.py, 01c1623", tokens=1024, page=16),
        Preset("code", "mit-han-lab/Quest, evaluation/quest_attention.py, 01c1623", dense=2),
        Preset("longbench", "mit-han-lab/Quest, scripts/longbench.sh (512 to 4096), 01c1623", tokens=512, page=16),
        Preset("demo", "mit-han-lab/Quest, scripts/example_demo.py, 01c1623", tokens=2048, page=16),
    )

    tokens: int = param(1024, ge=1, le=1048576, unit="tokens", help="how many each query head attends to")
    page: int = param(16, ge=1, le=1024, unit="tokens", help="that are chosen together")
    dense: int = param(2, ge=0, le=256, unit="layers", help="at the beginning, in which everything is attended to")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.budget is not None:
            raise BadParameter(
                f"quest: everything stays in memory, so there is no budget; tokens={self.tokens} says how many of them "
                "a query attends to"
            )

    @classmethod
    def takes_budget(cls) -> bool:
        return False

    def select(self, study: Study, dtype: torch.dtype, shapes: Sequence[Shape]) -> Selection:
        return PageSelection(dtype, self.page, max(self.tokens // self.page, _LEAST), self.dense)
