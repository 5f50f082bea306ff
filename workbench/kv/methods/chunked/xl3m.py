"""XL3M: segments read one by one with the question; those after which the model is surest are read again together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kv.asked import asked
from workbench.kv.key_context import KeyContext
from workbench.kv.segments import entropy, overlapping, surest
from workbench.registry import Fidelity, Paper, Preset, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult

_LEAST = 4  # a sink, a token of a segment, and two of the question
_FREE = 8  # of a text longer than the model's positions, one in so many is left for questions and answers


@register
class XL3M(KeyContext):
    """Read each segment with the question alone, and keep together those that leave the model surest of its answer.

    The context is cut into segments; each is read with the question on an empty cache, and the entropy of the next
    token after it says how relevant it is: the lower, the more. The segments of lowest entropy that fit are put
    together in the order of the text and read once more, and that cache is what remains. No cache ever holds more than
    the key context, however long the text is.

    Segments overlap, so that what one cuts another has whole. The question is judged in its words alone: what a chat
    template puts after them would ask for the first word of a reply, which the paper's questions do not.

    Choices where the paper's text was not at hand: how far segments overlap; at least two fit into the room, and the
    last one that fits only in part gives its beginning; the first `sinks` tokens stand before every segment and stay,
    and so do the prompt's last `query` tokens, which stand for a question that is not known, as in the paper, where the
    question ends the prompt. Layers that slide need their whole last window, so it stays too. Segments alone are read
    from position 0 on. The key context stands at its true positions where the model has that many, so that nothing
    changes but what is left out; where the text is longer, it closes up and an eighth of the positions stays free.
    """

    key = "xl3m"
    title = "XL3M"
    paper = Paper(
        "XL3M: A Training-free Framework for LLM Length Extension Based on Segment-wise Inference",
        "Wang et al. 2024",
        "2405.17755",
    )
    claim = "a model of 4,096 positions reasons over 20 million tokens"
    fidelity = Fidelity("reconstructed from the abstract", "how long segments are, and how they overlap; sinks")
    presets = (Preset("paper", "abstract: the question is a few tokens from the end of the text", template=False),)
    default_budget = 0.5
    question_aware = True

    segment: int = param(
        256,
        ge=1,
        le=8192,
        unit="tokens",
        help="pieces of the text that are judged, at most",
        own="the abstract has no number for it",
    )
    overlap: float = param(
        0.25,
        ge=0,
        le=0.75,
        help="share of a segment that the next one begins with",
        own="the paper's windows overlap so that no sentence is cut for all; by how much was not read",
    )
    template: bool = param(False, help="whether the chat template's tokens after the question are read before judging")

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        prefill.need_text()
        tokens, positions = prefill.tokens, prefill.max_positions
        slide = prefill.widest_window
        total = prefill.entries(max(_LEAST, slide + 1), lambda _: prefill.scattered_nbytes)
        too_long = tokens > positions
        if too_long:
            total = min(total, positions - positions // _FREE)
        if total >= tokens:
            prefill.feed_prompt(self.chunk)
            return prefill.result()

        sinks, last = self.ends(total, slide)
        question = prefill.ids[-self.query :] if prefill.question is None else self._judged(prefill)
        question = question[-max(total // 2, 1) :]
        room = total - sinks - last
        size = max(min(self.segment, total - sinks - question.numel(), room // 2), 1)
        segments = overlapping(torch.arange(sinks, tokens - last), size, self.overlap)
        entropies = torch.stack([self._entropy(prefill, segment, question, sinks) for segment in segments])
        where = torch.cat([torch.arange(sinks), surest(segments, entropies, room), torch.arange(tokens - last, tokens)])
        prefill.read_only(where, self.chunk, closed_up=too_long)

        notes = [] if prefill.question is not None else ["no question was known: the prompt's end stood for it"]
        if not too_long:
            return prefill.result(notes=tuple(notes))
        notes.append(
            f"the text is longer than the model's {positions:,} positions: the {where.numel():,} tokens kept of it "
            "stand one after another"
        )
        heads = (prefill.compressible or prefill.layers)[0].kv_heads
        tiers = torch.zeros(len(prefill.layers), heads, tokens, dtype=torch.uint8)
        for layer in prefill.layers:
            kept = torch.arange(tokens - (layer.window or 0), tokens) if layer.index in prefill.exact else where
            tiers[layer.index, :, kept] = 1
        return prefill.result(tiers=tiers.to(prefill.device), notes=tuple(notes))

    def _judged(self, prefill: ChunkedPrefill) -> Tensor:
        """The question's ids after which the model's next token is judged."""
        assert prefill.question is not None
        return prefill.question if self.template else asked(prefill.prompt, prefill.question)

    def _entropy(self, prefill: ChunkedPrefill, segment: Tensor, question: Tensor, sinks: int) -> Tensor:
        """The entropy of the next token after a segment, at positions [s] of the prompt, and the question's ids [q]."""
        prefill.progress.update(f"judging segments for {self.key}", int(segment[0]), prefill.tokens)
        prefill.reset()
        return entropy(prefill.feed(torch.cat([prefill.ids[:sinks], prefill.ids[segment], question])))
