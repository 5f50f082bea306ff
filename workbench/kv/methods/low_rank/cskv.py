"""CSKV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

import torch

from workbench.kv.base import KVMethod
from workbench.kv.fitting import first_fitting, halvings, pruning_steps
from workbench.kv.stores.format import DenseFormat, Format, Shape, stored_nbytes
from workbench.kv.stores.low_rank import LowRankFormat, Ranks
from workbench.kv.stores.pruned import kept_of
from workbench.registry import Paper, param, register

_GROUP = 32  # tokens of a feature that share a scale and a zero, as published


@register
class CSKV(KVMethod):
    """Keep every token, but of older ones only a few coefficients in a low-rank space; the newest tokens stay whole.

    Two branches: the newest `window` tokens as they are, and for what has left the window low-rank features of keys
    and values, taken before rotary embedding and rotated again at their true positions when they are attended to.
    At 4 bits the features are quantised as in KIVI, keys over 32 tokens of a feature and values over the features of a
    token, and tokens leave the window 32 at a time. Every layer has the same rank.

    The paper factors the projection weights by SVD and then trains the factors to reproduce each layer's keys and
    values. We train nothing: the factors are the singular vectors of the prompt's own keys and values, at which that
    reconstruction loss is smallest on this prompt. They serve the answer too, and a prompt much shorter than a
    head is wide gains nothing, for the factors are part of the bytes. Each KV head has factors of its own, where the
    paper's mix the heads of a layer, so that heads may also keep different tokens.

    With a budget, "auto" keeps as many channels as fit, and shortens the window where a fifth of them is too much;
    without one it keeps a fifth, as published.
    """

    key = "cskv"
    title = "CSKV"
    paper = Paper(
        "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
        "Wang et al. 2024",
        "2409.10593",
    )
    claim = "80 % less KV memory with long-context ability kept, 95 % with 4-bit quantisation"

    kept: Literal["auto", 80, 60, 50, 40, 30, 20, 10, 5] = param(
        "auto", unit="%", help="channels left of older keys and values, or as many as the budget allows"
    )
    window: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens that stay whole")
    bits: Literal[16, 4] = param(16, help="16: features at the cache's own precision; 4: quantised")

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        widths = max(shape.key_width for shape in shapes), max(shape.value_width for shape in shapes)
        if limit is None:
            return self._format(dtype, widths, 0.8 if self.kept == "auto" else 1 - self.kept / 100, self.window)
        everything = torch.tensor([[shape.tokens] * shape.kv_heads for shape in shapes])
        full = sum(shape.full_nbytes for shape in shapes)
        # On a short prompt the factors may take more than they save.
        smaller = (f for f in self._formats(dtype, widths) if stored_nbytes(f, shapes, everything) < full)
        return first_fitting(chain([DenseFormat(dtype)], smaller), shapes, limit)

    def _formats(self, dtype: torch.dtype, widths: tuple[int, int]) -> Iterator[Format]:
        """What a budget may choose from besides the uncompressed cache, best first."""
        if self.kept == "auto":
            steps: Iterator[tuple[float, int]] = pruning_steps(max(widths), self.window)
        else:
            steps = ((1 - self.kept / 100, window) for window in halvings(self.window))
        for pruned, window in steps:
            yield self._format(dtype, widths, pruned, window)

    def _format(self, dtype: torch.dtype, widths: tuple[int, int], pruned: float, window: int) -> Format:
        ranks = Ranks(kept_of(widths[0], pruned), kept_of(widths[1], pruned))
        if self.bits == 16:
            return LowRankFormat(dtype, ranks, window)
        return LowRankFormat(dtype, ranks, window, bits=self.bits, group=_GROUP)
