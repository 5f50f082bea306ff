"""Streaming windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod, PassContext, visible_entries
from workbench.attention.entry_budget import allowed_entries, widest_window, windowed_attention
from workbench.attention.visible_scores import VisibleScores
from workbench.core.partial_softmax import ROWS, PartialSoftmax, between
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench_kernels import Scoring

if TYPE_CHECKING:
    from workbench.kv.stores import Dequantised


@register
class StreamingWindow(AttentionMethod):
    """Let every query see the first tokens and the last ones, and nothing between.

    The first tokens take up attention that has nowhere else to go; without them a sliding window fails (StreamingLLM).
    As a pattern for reading prompts this is the A-shape of MInference. The scores of the two parts share one softmax.
    With a budget, window and first tokens together are as wide as it allows, and `window` is not used.

    Decoding goes on so: a new token sees, of what the cache holds, the first tokens and the last ones by their true
    positions. Without a budget both are as wide as they were set; with one, as wide as it made them for the prompt,
    however many tokens follow (a budget of 1: all is seen). The cache itself keeps everything; the KV method
    `streaming-llm` drops what this does not look at.
    """

    key = "streaming-window"
    title = "Streaming window"
    paper = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al. 2023", "2309.17453")
    claim = "stable perplexity on endless text with 4 sinks and a window"
    fidelity = Fidelity("deviates", "tokens keep their true positions, where the paper numbers what the cache holds")
    presets = (
        Preset("code", "mit-han-lab/streaming-llm, examples/run_streaming_llama.py, b67bb6d", sinks=4, window=2000),
    )

    decodes: ClassVar[bool] = True

    sinks: int = param(4, ge=0, le=4096, unit="tokens", help="first tokens that all see")
    window: int = param(
        512,
        ge=1,
        le=1_048_576,
        unit="tokens",
        help="how far back a query looks, itself included",
        own="the code's 2,000 see all of the prompts that are read here; with a budget it is as wide as that allows",
    )

    def widths(self, tokens: int) -> tuple[int, int]:
        """How many first tokens and how wide a window on a prompt of this length."""
        if self.budget is None:
            return self.sinks, self.window
        width = max(widest_window(tokens, allowed_entries(self.budget, tokens)), 1)
        sinks = min(self.sinks, width - 1)
        return sinks, width - sinks

    def decode(
        self, query: Tensor, contents: Dequantised, visible: Tensor, scoring: Scoring, context: PassContext
    ) -> Tensor:
        if not self.whole:
            sinks, width = self.widths(context.tokens)
            where = contents.positions[:, None]  # [k or 1, 1, m]
            visible = visible & ((where < sinks) | (where > context.positions.to(where.device)[:, None] - width))
        context.count_seen(len(query), visible)
        out = torch.empty(*query.shape[:2], contents.values.shape[-1], dtype=query.dtype, device=query.device)
        for start in range(0, query.shape[1], ROWS):
            rows = query[:, start : start + ROWS].float() * scoring.scale
            at = context.positions[start : start + ROWS]
            near = VisibleScores.of(rows, contents, visible[:, start : start + ROWS], scoring, at)
            out[:, start : start + ROWS] = near.softmax().output(scoring)
        return out

    def entries(self, tokens: int, layers: int) -> int:
        return layers * visible_entries(tokens, sum(self.widths(tokens)))  # each query sees sinks + window positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, context: PassContext) -> Tensor:
        tokens = query.shape[1]
        sinks, width = self.widths(tokens)
        entries = visible_entries(tokens, sinks + width)
        if scoring.window is not None or sinks + width >= tokens:
            return windowed_attention(query, key, value, scoring, context, entries)
        context.count(query.shape[0] * entries)
        out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
        for start in range(0, tokens, ROWS):
            stop = min(start + ROWS, tokens)
            low = max(0, start - width + 1)
            rows = query[:, start:stop].float() * scoring.scale
            at_row = torch.arange(start, stop, device=query.device)[:, None]
            near = torch.arange(low, stop, device=query.device)
            part = PartialSoftmax.over(
                rows,
                key[:, low:stop],
                value[:, low:stop],
                scoring,
                hidden=(near > at_row) | (near <= at_row - width),
                offsets=between(scoring, stop, low, stop, key.device),
            )
            far = min(sinks, stop - width)  # first tokens that have left some query's window
            if far > 0:
                hidden = torch.arange(far, device=query.device) > at_row - width
                offsets = between(scoring, stop, 0, far, key.device)
                part = part.merged(
                    PartialSoftmax.over(rows, key[:, :far], value[:, :far], scoring, hidden=hidden, offsets=offsets)
                )
            out[:, start:stop] = part.output(scoring)
        return out
