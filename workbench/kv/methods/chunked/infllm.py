"""InfLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.kv.base import KVMethod
from workbench.kv.stores.blocks import BlockStore
from workbench.kv.stores.tiered import TieredFormat
from workbench.registry import Fidelity, Paper, Preset, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult


@register
class InfLLM(KVMethod):
    """Read with a sliding window; distant context waits in host memory, and each pass fetches the blocks it needs.

    Section 2 of the paper. On the device: the first `sinks` tokens and a window as large as the budget allows. What
    leaves it goes to host memory in blocks of `block` tokens. A block is represented by the `representatives` keys that
    received most attention from the tokens behind them while they were in the window, and its relevance is the sum of
    their products with the queries of a pass over all heads; that sum needs only their mean, so only the mean is on the
    device. A pass (up to 128 tokens of the prompt or the question, or one new token) attends to the sinks, the window
    and its `blocks` most relevant blocks. All that is further back than the window counts as exactly one window away,
    so a text may be longer than the model's positions.

    Open details: representatives are chosen for each KV head, by the sum over its query heads of softmax weights, as in
    the official code; the means are rounded to the cache's precision; fetched blocks are working memory of the layer
    that attends, not cache: none stays on the device for the next pass. The index grows by one mean a block, and the
    budget holds the index of the whole prompt: a text too long for that is refused.
    """

    key = "infllm"
    title = "InfLLM"
    paper = Paper(
        "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
        "Xiao et al. 2024",
        "2402.04617",
    )
    claim = "models trained on a few thousand tokens read 1,024K tokens without training"
    fidelity = Fidelity("as published", "sinks and blocks are smaller, for prompts that are shorter")
    presets = (
        Preset(
            "code",
            "thunlp/InfLLM, config/mistral-inf-llm.yaml, 12b7079",
            representatives=4,
            blocks=16,
            sinks=128,
            block=128,
        ),
    )
    default_budget = 0.25
    own_stores = True

    sinks: int = param(
        16,
        ge=0,
        le=256,
        unit="tokens",
        help="tokens at the beginning that every query sees",
        own="the code's 128, with a block of 128, do not fit into a quarter of a prompt below 1,028 tokens",
    )
    block: int = param(
        32,
        ge=1,
        le=512,
        unit="tokens",
        help="tokens that go to host memory, and come back, together",
        own="see `sinks`: 16 blocks of 128 would be all of a prompt of 2,048 tokens",
    )
    representatives: int = param(4, ge=1, le=64, unit="tokens", help="keys that stand for a block when it is looked up")
    blocks: int = param(16, ge=1, le=256, help="blocks that a pass fetches")
    piece: int = param(
        128,
        ge=1,
        le=128,
        unit="tokens",
        help="tokens of the prompt read at once, at most",
        own="512 in the code; the store looks up for at most 128 at once",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        layers = prefill.compressible
        means = sum(layer.kv_heads * layer.keys_held.shape[-1] for layer in layers) * prefill.dtype.itemsize
        masses = sum(layer.kv_heads for layer in layers) * 4

        def extra(each: int) -> int:
            return each * masses + -(-(prefill.tokens - each) // self.block) * means

        room = prefill.entries(self.sinks + self.block + 1, extra)
        if room >= prefill.tokens:
            prefill.feed_prompt(self.piece)
            return prefill.result()
        for layer in layers:
            empty = prefill.empty(layer).contents(prefill.dtype)
            prefill.stores[layer.index] = BlockStore.empty(
                empty.keys,
                empty.values,
                layer.rotation,
                room=room,
                sinks=self.sinks,
                window=min(self._window(room), prefill.max_positions),
                block=self.block,
                representatives=min(self.representatives, self.block),
                blocks=self.blocks,
            )
        prefill.feed_prompt(self._piece(room))
        return prefill.result(form=TieredFormat(prefill.dtype))

    def _piece(self, each: int) -> int:
        """Tokens read at once when each head has room for so many."""
        return max(min(self.piece, each // 4, each - self.sinks - self.block), 1)

    def _window(self, each: int) -> int:
        """Tokens behind a query, itself included, that are always on the device then."""
        return max(each - self.sinks - self._piece(each) - self.block + 1, 1)
