"""StreamMem."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.kv.frame_prototypes import chosen, with_prototypes
from workbench.kv.stores import DenseStore
from workbench.prompt import Prompt, has_template
from workbench.registry import Fidelity, Paper, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult


@register
class StreamMem(KVMethod):
    """Read a stream into a memory of fixed size, by the attention of a generic query and with a prototype a frame.

    The stream is read chunk by chunk, without knowing what will be asked. When the next chunk has no room, the tokens
    of the chat template that begin an answer are shown as a query that stands for any; an entry's score is the
    attention it gets from them, averaged over tokens and the heads of its group. The highest of memory and new entries
    stay, and of each new frame that loses some a prototype: the means of its keys and of its values, weighted by their
    scores (frame-wise KV merging). Later a prototype is an entry like any other.

    Made for video: a frame is here a run of `frame` tokens, in a prompt with images of as many as stand for one; the
    filter that merges similar images before they are read is left out. Chosen here: a prototype stands at the dropped
    position nearest to the middle of its frame, and keys are averaged without their rotary embedding and then turned to
    that position; prototypes take at most a quarter of the memory, frames grow where they would take more. Without a
    chat template the last `proxy` tokens read are the query. True positions are kept, so that the paper's extension of
    the context (YaRN) is not needed up to the model's own. The budget bounds what is held while reading, so that the
    memory shrinks to it less one chunk.
    """

    key = "streammem"
    title = "StreamMem"
    paper = Paper(
        "StreamMem: Query-Agnostic KV Cache Memory for Streaming Video Understanding", "Yang et al. 2025", "2508.15717"
    )
    claim = "a memory of fixed size, competitive with compression that knows the question"
    fidelity = Fidelity("deviates", "runs of tokens stand for a video's frames, and no frames are filtered out")
    default_budget = 0.25

    chunk: int = param(
        256,
        ge=1,
        le=8192,
        unit="tokens",
        help="read at once, at most a quarter of the memory",
        own="a clip of frames in the paper, which text has not",
    )
    frame: int = param(
        32,
        ge=2,
        le=1024,
        unit="tokens",
        help="new tokens that share one prototype",
        own="a frame in the paper, which text has not",
    )
    merging: bool = param(
        True,
        help="keep a prototype of each frame beside its best entries",
        own="as in the paper, which gives no name or number to it",
    )
    proxy: int = param(
        8,
        ge=1,
        le=256,
        unit="tokens",
        help="last tokens that stand for a query without a template",
        own="the paper's models have a template",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        total = prefill.entries(2)
        query = template_ids(prefill.prompt)
        condensed = 0  # how many tokens had been read when the memory last shrank
        for piece in prefill.pieces(self.chunk if total == prefill.tokens else min(self.chunk, max(total // 4, 1))):
            slots = [prefill.stores[layer.index].slot_positions.shape[1] for layer in prefill.compressible]
            room = total - len(piece)
            if max(slots, default=0) > room:
                last = prefill.ids[max(prefill.position - self.proxy, 0) : prefill.position]
                self._shrink(prefill, last if query is None else query, room, prefill.position - condensed)
                condensed = prefill.position
            prefill.feed(piece)
        return prefill.result()

    def _shrink(self, prefill: ChunkedPrefill, query: Tensor, room: int, new: int) -> None:
        """Leave `room` entries of each head, of which the last `new` were read since the last time."""
        frame = self.frame_of(room, new, prefill.prompt)
        scores = prefill.probe(query, lambda _, rows: rows.mean(dim=(1, 2)))
        for layer, score in zip(prefill.compressible, scores, strict=True):
            memory = prefill.stores[layer.index].contents(torch.float32)
            keys, values, positions = memory.keys, memory.values, memory.positions
            kept, standing = chosen(score, room, new, frame)
            if frame:
                keys, values = with_prototypes(layer, keys, values, score, standing, new, frame, positions)
            prefill.stores[layer.index] = DenseStore.of(keys, values, positions, kept | standing, prefill.dtype)

    def frame_of(self, room: int, new: int, prompt: Prompt | None = None) -> int:
        """Tokens of a frame, so that the prototypes of `new` tokens take at most a quarter of `room`; 0: no frames."""
        if not self.merging or room < 4:
            return 0
        frame = self.frame if prompt is None or prompt.images is None else max(prompt.images.counts)
        return max(frame, -(-new // (room // 4)))


def template_ids(prompt: Prompt) -> Tensor | None:
    """The ids [q] of the chat template that end a user's turn and begin the answer; None without a template."""
    if prompt.tokenizer is None or not has_template(prompt.tokenizer):
        return None
    ids = replace(prompt, chat=True, open_turn=True).question_ids(None, prompt.tokenizer)
    return ids if ids.numel() else None
