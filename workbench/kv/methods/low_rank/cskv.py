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
from workbench.registry import Fidelity, Paper, Preset, param, register


@register
class CSKV(KVMethod):
    """Keep every token, but of older ones only a few coefficients in a low-rank space; the newest tokens stay whole.

    Two branches: the newest tokens as they are, until there are `window` of them, which then leave together; and for
    what has left, low-rank features of keys and values, taken before rotary embedding and rotated again at their true
    positions when they are attended to. The prompt's whole windows have left when it is read. At 4 bits the features
    are quantised as in KIVI, keys over a window of a feature and values over the share of a token's features that falls
    to one head. All heads of a layer have one space together, of as many directions as the heads keep channels, and
    every layer has the same rank.

    The paper factors the projection weights by SVD and then trains the factors to reproduce each layer's keys and
    values. We train nothing: the factors are the singular vectors of the prompt's own keys and values, at which that
    reconstruction loss is smallest on this prompt. They serve the answer too. The paper's belong to the model and cost
    no prompt anything; ours are part of the bytes, so a prompt much shorter than all heads of a layer are wide gains
    nothing. Where another method drops tokens, heads may keep different ones, and each has a space of its own.

    With a budget, "auto" keeps as many channels as fit, and at 16 bits shortens the window where a fifth of them is too
    much; without one it keeps a fifth, as published.
    """

    key = "cskv"
    title = "CSKV"
    paper = Paper(
        "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios",
        "Wang et al. 2024",
        "2409.10593",
    )
    claim = "80 % less KV memory with long-context ability kept, 95 % with 4-bit quantisation"
    fidelity = Fidelity(
        "untrained part of a trained method", "the factors are found on the prompt, not trained on other texts"
    )
    presets = (
        Preset("readme", "wln20/CSKV, README.md, cd79226", kept=50, window=32, bits=16, joint=True),
        Preset("abstract", "abstract: 80 % less", kept=20),
        Preset("abstract, 4 bits", "abstract: 95 % less", kept=20, bits=4),
    )

    kept: Literal["auto", 80, 60, 50, 40, 30, 20, 10, 5] = param(
        "auto",
        unit="%",
        help="channels left of older keys and values, or as many as the budget allows",
        own="a budget decides; without one it is the abstract's 20 %, not the 50 % of the code's example",
    )
    window: int = param(32, ge=0, le=4096, unit="tokens", help="newest tokens that stay whole until there are so many")
    bits: Literal[16, 4] = param(16, help="16: features at the cache's own precision; 4: quantised")
    joint: bool = param(True, help="one space for all heads of a layer instead of one for each")

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
        window = self.window if self.bits == 16 else 0  # at 4 bits scales belong to a whole window
        if self.kept == "auto":
            steps: Iterator[tuple[float, int]] = pruning_steps(max(widths), window)
        else:
            steps = ((1 - self.kept / 100, shorter) for shorter in halvings(window))
        for pruned, shorter in steps:
            yield self._format(dtype, widths, pruned, shorter if self.bits == 16 else self.window)

    def _format(self, dtype: torch.dtype, widths: tuple[int, int], pruned: float, window: int) -> Format:
        ranks = Ranks(*(max(int(width * (1 - pruned) + 1e-9), 1) for width in widths))
        bits = None if self.bits == 16 else self.bits
        return LowRankFormat(dtype, ranks, bits=bits, group=max(window, 1), joint=self.joint)
