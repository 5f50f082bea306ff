"""ILRe: the layers up to one in the middle tell which tokens the question needs; only those are read in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.kv.key_context import KeyContext
from workbench.kv.recall import attention_to, recalled, widths
from workbench.kv.stores.format import INDEX_BYTES
from workbench.kv.stores.keys_only import KeyStore
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult

_LEAST = 4  # entries of an early layer with which a stream still has a sink, a window and a token to read


@register
class ILRe(KeyContext):
    """Recall tokens for the question at an early layer, and read only those through the whole model.

    The context is streamed in pieces through the layers below the retrieval layer, which hold only sinks and a sliding
    window, up to the keys of that layer, which are all held; there the forward pass stops. The question's attention to
    them there, max-pooled by kernels of several widths, chooses the tokens; these are read once more by all layers,
    with full attention among them. What the early layers and the retrieval layer hold counts: where the keys of one
    layer do not fit into the budget, it is refused.

    Choices where the paper's text was not at hand: scores are the softmax over the context averaged over the
    question's tokens and heads; every width gets an equal part of the room, in turns from its highest pooled score
    down; sinks and the prompt's last `query` tokens always stay. Tokens are read again at their true positions. Without
    a question, those last tokens stand for it. The layer is the first at or above `layer` that does not slide; layers
    that slide need their whole last window, so it is always recalled.

    Which layer recalls best is measured once for a model: the paper reports the third of 32 for a Llama of 8B; of
    SmolLM2-135M's 30, the 18th to 25th recall a needle whole where those before the 13th lose it.
    """

    key = "ilre"
    title = "ILRe"
    paper = Paper(
        "ILRe: Intermediate Layer Retrieval for Context Compression in Causal Language Models",
        "Liang et al. 2025",
        "2508.17892",
    )
    claim = "one million tokens in half a minute, some 180 times faster, at 79.8 on RULER"
    fidelity = Fidelity(
        "reconstructed from the abstract",
        "how scores are pooled and shared out; the layer's depth is given, not searched",
    )
    presets = (
        Preset("llama-8b", "layer 3 of 32 of Llama-3.1-UltraLong-8B, as a review of the paper has it", layer=0.09375),
    )
    default_budget = 0.5
    question_aware = True

    layer: float = param(
        0.6,
        ge=0.0,
        le=1.0,
        unit="of the depth",
        help="where tokens are recalled; depends on the model",
        own="found for each model: on smollm2-135m 0.6 loses 0.01 nats in half of the cache and finds 3 of 3 needles "
        "in 512 tokens, layer 3 of 32 loses 1.44 and finds 1",
    )
    window: int = param(
        512,
        ge=1,
        le=8192,
        unit="tokens",
        help="what layers before that one see of the past, at most",
        own="the abstract has no number for it",
    )
    kernels: int = param(
        3,
        ge=1,
        le=6,
        help="pooling widths among which the room is shared",
        own="several in the abstract, which does not say how many",
    )
    widest: int = param(
        33,
        ge=1,
        le=255,
        odd=True,
        unit="tokens",
        help="the widest of them; the narrowest is 1",
        own="the abstract has no number for it",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        retrieval = self._retrieval_layer(prefill)
        early = [layer for layer in prefill.compressible if layer.index < retrieval.index]
        shape = prefill.shape(retrieval)
        keys = shape.tokens * shape.kv_heads * shape.key_width * shape.itemsize
        stream = sum(_entry_nbytes(prefill, layer) for layer in early)
        entry = sum(_entry_nbytes(prefill, layer) for layer in prefill.compressible)
        first = keys + stream * min(_LEAST, prefill.tokens)  # what streaming needs at least

        slide = prefill.widest_window
        total = prefill.entries(
            max(_LEAST, slide + 1), lambda each: max(first - each * entry, prefill.scattered_nbytes)
        )
        if total >= prefill.tokens:
            prefill.feed_prompt(self.chunk)
            return prefill.result()

        spare = None if prefill.limit is None or not stream else (prefill.room - keys) // stream
        scores = self._scores(prefill, retrieval, early, spare)
        sinks, last = self.ends(total, slide)
        where = recalled(scores, widths(self.kernels, self.widest), total, sinks, last)
        prefill.read_only(where, self.chunk)
        notes = () if prefill.question is not None else ("no question was known: the prompt's end stood for it",)
        return prefill.result(notes=notes)

    def _retrieval_layer(self, prefill: ChunkedPrefill) -> LayerTrace:
        """The first layer at or above the chosen depth that does not slide, never the very first if there are more."""
        wanted = max(round(self.layer * len(prefill.layers)), 1)
        return next((layer for layer in prefill.compressible if layer.index >= wanted), prefill.compressible[-1])

    def _scores(
        self, prefill: ChunkedPrefill, retrieval: LayerTrace, early: list[LayerTrace], spare: int | None
    ) -> Tensor:
        """The attention of the question to every token at the retrieval layer, float32 [n].

        spare: how many entries a head of an early layer may hold, None where nothing limits them.
        """
        room = self.sinks + self.window + self.chunk if spare is None else spare
        sinks = min(self.sinks, room // 4)
        piece = min(self.chunk, max((room - sinks) // 2, 1))
        window = min(self.window, room - sinks - piece)
        question = prefill.question if prefill.question is not None else prefill.ids[:0]
        prefill.check_positions(prefill.tokens + question.numel())

        shape = prefill.shape(retrieval)
        room_for_keys = (shape.kv_heads, shape.tokens, shape.key_width)
        keys = KeyStore(torch.empty(room_for_keys, dtype=prefill.dtype, device=retrieval.device))
        prefill.stores[retrieval.index] = keys
        queries: list[Tensor] = []
        for ids, of_prompt in _pieces(prefill, question, piece):
            for layer in early:
                _make_room(prefill, layer, sinks, window)
            query, key = prefill.feed_below(retrieval.index, ids)
            if of_prompt:
                keys.append(key, key, torch.arange(prefill.position - len(ids), prefill.position))
            queries = [torch.cat([*queries, query], dim=1)[:, -(question.numel() or self.query) :]]
        positions = torch.arange(prefill.position - queries[0].shape[1], prefill.position)
        return attention_to(queries[0], keys.appended, positions.to(retrieval.device), retrieval)


def _entry_nbytes(prefill: ChunkedPrefill, layer: LayerTrace) -> int:
    """Bytes of one entry of every head of a layer, with its position."""
    return layer.kv_heads * (prefill.shape(layer).entry_nbytes + INDEX_BYTES)


def _pieces(prefill: ChunkedPrefill, question: Tensor, most: int) -> Iterator[tuple[Tensor, bool]]:
    """The prompt's pieces and then the question's, and whether it is the prompt's."""
    for piece in prefill.pieces(most):
        yield piece, True
    if question.numel():
        for piece in question.split(most):
            yield piece, False


def _make_room(prefill: ChunkedPrefill, layer: LayerTrace, sinks: int, window: int) -> None:
    """Leave an early layer its sinks and the window before the next token."""
    positions = prefill.stores[layer.index].slot_positions.expand(layer.kv_heads, -1)
    prefill.keep(layer.index, (positions < sinks) | (positions >= prefill.position - window))
