"""LiveVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kv.base import KVMethod
from workbench.kv.bucketing import bucketed
from workbench.kv.stores.paged import PagedStore
from workbench.registry import Fidelity, Paper, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult


@register
class LiveVLM(KVMethod):
    """Read a stream into a memory of fixed size spread over all of it, of which a question opens the pages it needs.

    Second version of the paper (2026). Vision sink bucketing: when the next piece has no room, what is older than the
    `recent` tokens is compressed by the attention that the last `window` tokens read give to it. The best `retention`
    of the places go by score alone; the others to the best of each of as many equal stretches of the text as there are
    places, where none of it is there yet. Position-agnostic retrieval: a question attends to the recent tokens and to
    the share `retrieved` of the memory's pages, those whose mean keys without rotary embedding its queries, without it
    too, attend to most; the answer stays with them.

    Made for video: in a prompt with images `sinks` are the tokens before the first image, and `window` is as many as
    stand for the last. Of plain text any tokens stand for those of an image, and the first `sinks` for the prompt
    before the video; they always stay and are always seen. Open details chosen here: scores are averaged over all heads
    of a layer, which keep the same positions and open the same pages; places that no stretch fills go by score. Like
    the paper, which does without host memory, this forgets what it drops: the budget is all there is.
    """

    key = "livevlm"
    title = "LiveVLM"
    paper = Paper(
        "LiveVLM: Efficient Online Video Understanding via Streaming-Oriented KV Cache and Retrieval",
        "Ning et al. 2025",
        "2505.15269",
    )
    claim = "44x more frames on the same device, and answers up to 5x faster"
    fidelity = Fidelity("deviates", "tokens of text may stand for those of images; widths and shares are chosen here")
    default_budget = 0.25

    sinks: int = param(
        4,
        ge=0,
        le=256,
        unit="tokens",
        help="tokens at the beginning that stand for the prompt's frame",
        own="as long as the prompt before the video in the paper",
    )
    recent: int = param(
        64,
        ge=0,
        le=8192,
        unit="tokens",
        help="short-term memory, at most a quarter of what is held",
        own="some frames in the paper, which text has not",
    )
    window: int = param(
        16,
        ge=1,
        le=256,
        unit="tokens",
        help="last tokens read, whose attention scores the others",
        own="a frame's tokens in the paper, which text has not",
    )
    retention: float = param(
        0.5, ge=0.0, le=1.0, help="share of the memory that goes by score alone", own="the paper's value was not read"
    )
    page: int = param(
        16,
        ge=1,
        le=256,
        unit="tokens",
        help="entries of the memory that are opened together",
        own="the paper's value was not read",
    )
    retrieved: float = param(
        0.4, ge=0.05, le=1.0, help="share of the pages that a question opens", own="the paper's value was not read"
    )
    piece: int = param(
        64,
        ge=1,
        le=4096,
        unit="tokens",
        help="tokens read at once, at most an eighth of what is held",
        own="how the prompt is read, not what stays: the budget holds while it is",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        sinks, window, images = self.sinks, self.window, prefill.prompt.images
        if images is not None:  # as published
            sinks, window = int(images.mask.nonzero()[0]), images.counts[-1]
        total = prefill.entries(sinks + 2)
        whole = total >= prefill.tokens
        piece = self.piece if whole else min(self.piece, max(total // 8, 1))
        recent = min(self.recent, total // 4, total - sinks - piece)
        queries: dict[int, Tensor] = {}  # of each layer's last tokens, [h, r, d]

        def observe(layer: int, query: Tensor, _key: Tensor, _value: Tensor) -> None:
            queries[layer] = query[:, -window:]

        for ids in prefill.pieces(piece):
            for layer in prefill.compressible:
                store = prefill.stores[layer.index]
                room, positions = total - len(ids), store.slot_positions[0]
                if len(positions) <= room:
                    continue
                query = queries[layer.index]
                at = torch.arange(prefill.position - query.shape[1], prefill.position)
                _, rows = store.attend(query, at, layer.scoring, weights=True)
                assert rows is not None  # [k, g, r, m]
                slots = self._kept(rows.mean(dim=(0, 1, 2)), positions, room, recent, sinks)
                prefill.keep(layer.index, slots.expand(layer.kv_heads, -1))
            prefill.feed(ids, observer=None if whole else observe)
        if whole:
            return prefill.result()
        for layer in prefill.compressible:
            store = prefill.stores[layer.index]
            positions = store.slot_positions[0]
            prefill.stores[layer.index] = PagedStore(
                store,
                layer.rotation,
                sinks=sinks,
                recent=int(positions[max(len(positions) - recent, sinks) - 1]) + 1,
                page=self.page,
                share=self.retrieved,
            )
        return prefill.result()

    def _kept(self, scores: Tensor, positions: Tensor, room: int, recent: int, sinks: int) -> Tensor:
        """Which entries stay, bool [m], when `room` may: sinks, the last `recent`, and the memory's best."""
        kept = torch.ones_like(positions, dtype=torch.bool)
        last = len(positions) - recent
        memory = slice(sinks, last)
        end = int(positions[last - 1]) + 1
        kept[memory] = bucketed(
            scores[memory], positions[memory].long(), sinks, end, room - sinks - recent, self.retention
        )
        return kept
