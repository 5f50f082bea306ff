"""Video-XL-2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import BadParameter, BudgetTooSmall
from workbench.kv.base import KVMethod
from workbench.kv.stores.levels import LevelStore
from workbench.kv.stores.tiered import TieredFormat
from workbench.registry import Fidelity, Paper, Preset, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult


@register
class VideoXL2(KVMethod):
    """Read chunk by chunk, hold each chunk coarse, and fetch whole from host memory those that the question needs.

    Chunk-based prefilling: a token attends to its own chunk, to the `before` chunks before it, and of all others only
    to their marks. Bi-level decoding: of each chunk there are the entries themselves and a sparse form, the marks and
    the means of every `pool` keys and values behind them. A question sees the first and the newest chunks and the
    `whole` most relevant others in full, of the rest the sparse form; the answer stays with them. Chunks become coarse
    as late as the budget allows, and their entries wait in host memory.

    Made for video, where the marks are the timestamp tokens of each group of frames: here they are the first `marks`
    tokens of a chunk, those of the first chunk also stand for the prompt before the video. Chosen here: a chunk's
    relevance is the attention that the question gives to its means, in each layer for itself (the official evaluation
    reads relevant chunks from a file); marks see no more than other tokens (there timestamps see everything, for which
    all chunks would have to be on the device); true positions are kept, where the official code closes up gaps; where
    a budget is too small for `pool`, or for some of the chunks before, it takes wider pools and fewer chunks. Fetched
    chunks are working memory of the layer that attends, not cache.
    """

    key = "video-xl-2"
    title = "Video-XL-2"
    paper = Paper(
        "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification",
        "Qin et al. 2025",
        "2506.19225",
    )
    claim = "over 10,000 frames on one 80 GB card"
    fidelity = Fidelity(
        "deviates",
        "runs of text stand for groups of frames; relevance is by attention, where the code reads it from a file",
    )
    presets = (
        Preset(
            "mlvu", "VectorSpaceLab/Video-XL, Video-XL-2/eval/lvu/w_chunk_bilevel/scripts/mlvu.sh, 6e3dc89", before=3
        ),
    )
    default_budget = 0.5
    own_stores = True

    chunk: int = param(
        64,
        ge=2,
        le=4096,
        unit="tokens",
        help="tokens that are read, and later fetched, together",
        own="four groups of frames in the scripts, which text has not",
    )
    marks: int = param(
        4,
        ge=1,
        le=64,
        unit="tokens",
        help="first tokens of a chunk, which all later ones see",
        own="the timestamps of a chunk in the paper, which text has not",
    )
    before: int = param(3, ge=0, le=64, help="whole chunks before its own that a token sees while reading")
    pool: int = param(
        4,
        ge=1,
        le=256,
        unit="tokens",
        help="entries averaged into one of the sparse form, at least",
        own="which step the evaluation takes was not found in its scripts",
    )
    whole: int = param(
        4,
        ge=1,
        le=256,
        help="chunks that a question fetches, besides the first",
        own="the evaluation reads from a file which chunks they are",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        if self.marks >= self.chunk:
            raise BadParameter(f"video-xl-2: marks ({self.marks}) must be fewer than a chunk's tokens ({self.chunk})")
        layers, rest = prefill.compressible, self.chunk - self.marks
        mean = sum(prefill.shape(layer).entry_nbytes * layer.kv_heads for layer in layers)
        least = (prefill.tokens - 1) // self.chunk * self.marks + self.chunk  # all but the last chunk coarse
        pool = min(self.pool, rest)

        def means(each: int) -> int:
            return -(-(prefill.tokens - each) // rest) * -(-rest // pool) * mean

        while True:
            try:
                room = prefill.entries(least, means)
                break
            except BudgetTooSmall:
                if pool == rest:
                    raise
                pool = min(2 * pool, rest)
        whole = room >= prefill.tokens
        stores: list[LevelStore] = []
        for layer in () if whole else layers:
            empty = prefill.empty(layer).contents(prefill.dtype)
            store = LevelStore.empty(
                empty.keys,
                empty.values,
                room=room,
                chunk=self.chunk,
                marks=self.marks,
                pool=pool,
                before=self.before,
                whole=self.whole,
            )
            prefill.stores[layer.index] = store
            stores.append(store)
        prefill.feed_prompt(self.chunk)
        for store in stores:
            store.reading = False
        return prefill.result() if whole else prefill.result(form=TieredFormat(prefill.dtype))
