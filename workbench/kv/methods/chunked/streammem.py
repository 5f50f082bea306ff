"""StreamMem."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.kv.base import KVMethod
from workbench.kv.stores import DenseStore
from workbench.prompt import Prompt, has_template
from workbench.registry import Fidelity, Paper, param, register
from workbench.trace import LayerTrace

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

    Made for video: a frame is here a run of `frame` tokens, and the filter that merges similar images before they are
    read has nothing to do on text. Chosen here: a prototype stands at the dropped position nearest to the middle of
    its frame, and keys are averaged without their rotary embedding and then turned to that position; prototypes take
    at most a quarter of the memory, frames grow where they would take more. Without a chat template the last `proxy`
    tokens read are the query. True positions are kept, so that the paper's extension of the context (YaRN) is not
    needed up to the model's own. The budget bounds what is held while reading, so that the memory shrinks to it less
    one chunk.
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
        frame = self.frame_of(room, new)
        scores = prefill.probe(query, lambda _, rows: rows.mean(dim=(1, 2)))
        for layer, score in zip(prefill.compressible, scores, strict=True):
            memory = prefill.stores[layer.index].contents(torch.float32)
            keys, values, positions = memory.keys, memory.values, memory.positions
            kept, standing = chosen(score, room, new, frame)
            if frame:
                keys, values = with_prototypes(layer, keys, values, score, standing, new, frame, positions)
            prefill.stores[layer.index] = DenseStore.of(keys, values, positions, kept | standing, prefill.dtype)

    def frame_of(self, room: int, new: int) -> int:
        """Tokens of a frame, so that the prototypes of `new` tokens take at most a quarter of `room`; 0: no frames."""
        if not self.merging or room < 4:
            return 0
        return max(self.frame, -(-new // (room // 4)))


def template_ids(prompt: Prompt) -> Tensor | None:
    """The ids [q] of the chat template that end a user's turn and begin the answer; None without a template."""
    if prompt.tokenizer is None or not has_template(prompt.tokenizer):
        return None
    ids = replace(prompt, chat=True, open_turn=True).question_ids(None, prompt.tokenizer)
    return ids if ids.numel() else None


def chosen(scores: Tensor, room: int, new: int, frame: int) -> tuple[Tensor, Tensor]:
    """Which of the slots [k, m] stay as they are, and which take a frame's prototype; bool [k, m] each.

    scores [k, m]; the last `new` slots make frames of `frame` (0: none). Together they are `room` in each head: where a
    frame lost nothing and needs no prototype, one more slot stays.
    """
    heads, slots = scores.shape
    frames = -(-new // frame) if frame else 0
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, : room - frames], True)
    standing = torch.zeros_like(kept)
    if not frames:
        return kept, standing
    lost = pad(~kept[:, slots - new :], (0, frames * frame - new)).view(heads, frames, frame)
    sizes = torch.full((frames, 1), frame, device=scores.device)
    sizes[-1] = new - (frames - 1) * frame
    offset = (torch.arange(frame, device=scores.device) - (sizes - 1) / 2).abs()  # [f, w], from the middle
    nearest = torch.where(lost, offset, torch.inf).argmin(dim=-1, keepdim=True)
    prototypes = torch.zeros_like(lost).scatter_(2, nearest, lost.any(dim=-1, keepdim=True))
    standing[:, slots - new :] = prototypes.view(heads, -1)[:, :new]
    # Of what is left, the best fill the places of prototypes that are not needed.
    free = frames - standing.sum(dim=1, keepdim=True)
    taken = (kept | standing).gather(1, order)
    fill = ~taken & ((~taken).cumsum(dim=1) <= free)
    return kept | torch.zeros_like(kept).scatter_(1, order, fill), standing


def with_prototypes(
    layer: LayerTrace,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    standing: Tensor,
    new: int,
    frame: int,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys [k, m, d] and values [k, m, dv] with the prototype of its frame in each slot of standing [k, m].

    scores [k, m] weigh; the last `new` slots, at positions [k or 1, m], make frames of `frame`.
    """
    heads, old = keys.shape[0], keys.shape[1] - new
    where = positions[:1, old:].expand(1, -1)[0].long()  # [f]: what has just been read is the same in all heads
    recent = keys[:, old:]
    if layer.rotary is not None:
        recent = layer.rotation.undo(recent, where)
    weights = scores[:, old:].clamp_min(torch.finfo(scores.dtype).tiny)
    frames = -(-new // frame)
    number = torch.arange(new, device=keys.device) // frame
    sums = torch.zeros(heads, frames, device=keys.device).index_add_(1, number, weights)
    weights = (weights / sums[:, number])[..., None]

    def means(x: Tensor) -> Tensor:
        sums = torch.zeros(heads, frames, x.shape[-1], device=x.device).index_add_(1, number, x * weights)
        return sums[:, number]  # [k, new, d]: at every slot what its frame's prototype would be

    merged = means(recent)
    if layer.rotary is not None:
        merged = layer.rotation.apply(merged, where)
    stands = standing[:, old:, None]
    keys = torch.cat([keys[:, :old], torch.where(stands, merged, keys[:, old:])], dim=1)
    values = torch.cat([values[:, :old], torch.where(stands, means(values[:, old:]), values[:, old:])], dim=1)
    return keys, values
