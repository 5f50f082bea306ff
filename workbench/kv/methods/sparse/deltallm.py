"""DeltaLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting, halvings, pruning_steps
from workbench.kv.stores.delta import DeltaFormat
from workbench.kv.stores.format import DenseFormat, Format, Shape
from workbench.registry import Fidelity, Paper, Preset, param, register

_STEPS = 128  # in which "auto" varies the share of zero deltas
_OPEN = "the abstract names the idea and no number"
_MORE = "keys are half of the bytes, so that small budgets need it; without a budget values stay whole, as published"
_KEYS_ALONE = 0.4  # up to this share of zeros in the keys the values stay whole


@register
class DeltaLLM(KVMethod):
    """Keep every token, but of its key only those channels that moved since the tokens before it.

    Neighbouring keys are alike in most channels. A channel keeps its last stored number until a token's differs from
    it by more than a threshold; every other delta is zero and costs one bit. So an error never exceeds the threshold
    and does not add up, unlike with differences between neighbours. Attention is hybrid: exact over the newest
    `window` tokens, over restored keys before them; a query adds up only deltas that are not zero.

    The description leaves open, and it was chosen here: the deltas begin anew every `group` tokens with a whole key,
    and each such block of a KV head has a threshold of its own, the smallest at which the share `sparsity` of its
    deltas is zero, so that the bytes are known beforehand. Tokens are compressed in whole blocks: up to `group` - 1
    more than the window are exact. The keys are those after rotary embedding, as scores need them, also while decoding.

    The published method leaves the values alone, and so does this one without a budget, at 60 % of zeros. With a
    budget, "auto" takes the fewest zeros that fit; beyond 40 % in the keys the values become deltas as well if
    `values` allows, with fewer zeros (the square of the keys' share), since neighbouring values are less alike.
    """

    key = "deltallm"
    title = "DeltaLLM"
    paper = Paper(
        "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference",
        "Qi et al. 2025",
        "2507.19608",
    )
    claim = "up to 60 % of the deltas zero while reading, 57 % with decoding, at about the same accuracy"
    of_entries = True
    fidelity = Fidelity(
        "reconstructed from the abstract",
        "a format of bytes: the prompt is read in full; open: blocks, thresholds, window",
    )
    presets = (Preset("abstract", "up to 60 % of the deltas zero", sparsity=60),)

    sparsity: Literal["auto", 30, 40, 50, 60, 70, 80, 90] = param(
        "auto",
        unit="%",
        help="share of key deltas that are zero, or as few as the budget asks for",
        own="a budget decides; without one it is the published 60",
    )
    window: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens with exact attention", own=_OPEN)
    group: Literal[16, 32, 64, 128] = param(
        64, unit="tokens", help="after how many tokens deltas begin anew", own=_OPEN
    )
    values: bool = param(True, help="whether values become deltas too where the budget needs it", own=_MORE)

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        if limit is None:
            zeros = 60 if self.sparsity == "auto" else self.sparsity
            return DeltaFormat(dtype, zeros / 100, None, self.group, self.window)
        return first_fitting(self._formats(dtype), shapes, limit)

    def _formats(self, dtype: torch.dtype) -> Iterator[Format]:
        """What a budget may choose from, best first."""
        if self.sparsity != "auto":
            zeros = self.sparsity / 100
            for values in (None, zeros**2) if self.values else (None,):
                for window in halvings(self.window):
                    yield DeltaFormat(dtype, zeros, values, self.group, window)
            return
        yield DenseFormat(dtype)
        for zeros, window in pruning_steps(_STEPS, self.window):
            values = zeros**2 if self.values and zeros > _KEYS_ALONE else None
            yield DeltaFormat(dtype, zeros, values, self.group, window)
