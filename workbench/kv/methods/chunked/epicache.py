"""EpiCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from workbench.errors import BudgetTooSmall
from workbench.kv.asked import asked
from workbench.kv.base import KVMethod
from workbench.kv.episodes import embedding, nearest_episode
from workbench.kv.head_order import best, most_attended, with_sinks
from workbench.kv.layer_sensitivity import key_similarity, layer_counts, layer_weights
from workbench.kv.stores.format import INDEX_BYTES
from workbench.prompt import Prompt
from workbench.registry import Fidelity, Paper, Preset, param, register

if TYPE_CHECKING:
    from workbench.kv.chunked_prefill import ChunkedPrefill, PrefillResult

_PROFILED = 512  # first tokens of the prompt on which the layers' sensitivity is measured
_WANTED = (
    "Pick out what matters in this part of the conversation: who speaks, names, dates and times, events, plans, "
    "opinions, relations and personal details."
)


@register
class EpiCache(KVMethod):
    """Cluster a conversation into episodes, and read it in blocks, keeping what the question's episode needs.

    The conversation is cut into segments, which k-means groups by their embeddings into episodes. For an episode the
    conversation is read block by block; whenever the next block has no room, the episode's medoid segments (those
    nearest to its centroid) are shown as a patched prompt, behind an instruction to pick out what matters; an entry's
    score is the most attention that any of their queries of any head of its group pays to it, and the lowest leave
    (section 3.2; as in the authors' code the softmax is over the held entries alone). A question is answered from the
    cache of the episode whose centroid is most similar to it. Layers share the room in proportion to (1 - s)^alpha,
    with s the mean cosine similarity between a layer's keys under full causal and under block-wise attention (section
    3.3), in spans of 100 tokens and scaled so that the layers lie from 0 to 1, as in the authors' code; there too none
    gets less than a quarter of the mean, and a block sees half of the one before it. So do the heads of a layer, by one
    order of all their scores.

    Chosen here: segments are `segment` tokens rather than some utterances. There is no sentence encoder: segments and
    questions are embedded by the mean of the model's own input embeddings, which the authors' code offers too ("llm").
    The instruction is in words of our own, and left out where there is no tokenizer. Only the cache of the episode
    asked for is built: the paper builds all in advance and keeps those not in use in host memory, while here a question
    costs a reading and no host memory; questions that follow in the same conversation stay with its episode. Without a
    question the prompt's last segment stands for it. The sensitivity is measured on the first 512 tokens of the prompt
    instead of a book, in four blocks. The first `sinks` positions stay, in place of the paper's system prompt. The
    budget bounds what is held while reading, so that an eviction leaves it less one block.
    """

    key = "epicache"
    title = "EpiCache"
    paper = Paper(
        "EpiCache: Episodic KV Cache Management for Long Conversational Question Answering",
        "Kim et al. 2025",
        "2509.17396",
    )
    claim = "up to 40 % better than recent evictors under fixed memory; 4-6x compression near full accuracy"
    fidelity = Fidelity(
        "deviates",
        "no sentence encoder: the model's input embeddings; one episode's cache at a time; segments of equal length",
    )
    presets = (
        Preset(
            "scripts",
            "apple/ml-epicache, scripts/run_epicache_llama.sh, b742661",
            episodes=4,
            medoids=8,
            alpha=1.1,
            heads="layer",
        ),
        Preset("code", "apple/ml-epicache, args.py, b742661", medoids=4, block=2048),
    )
    default_budget = 0.25
    head_adaptive = True
    question_aware = True

    episodes: int = param(4, ge=1, le=32, help="clusters of the conversation, each with a cache of its own")
    segment: int = param(
        64,
        ge=4,
        le=2048,
        unit="tokens",
        help="pieces of the conversation that are clustered",
        own="four utterances in the code; a prompt's text does not say where they end",
    )
    medoids: int = param(8, ge=1, le=16, help="segments nearest to an episode's centroid that choose what stays")
    block: int = param(
        256,
        ge=1,
        le=8192,
        unit="tokens",
        help="read at once, at most a quarter of the room",
        own="2,048 in the code, which lets the cache exceed its budget by that; here the budget holds while reading",
    )
    alpha: float = param(1.1, ge=0.0, le=4.0, help="how sharply layers differ in room; 0: all get the same")
    heads: Literal["layer", "equal"] = param(
        "layer", help="one order over all heads of a layer, or the same room for each head"
    )
    sinks: int = param(
        4,
        ge=0,
        le=256,
        unit="tokens",
        help="positions at the beginning that always stay",
        own="as long as the system prompt in the code",
    )

    def read(self, prefill: ChunkedPrefill) -> PrefillResult:
        prefill.need_text()
        layers = prefill.compressible
        total, equal = self._room(prefill)
        if total == prefill.tokens:
            prefill.feed_prompt(self.block)
            return prefill.result()

        episode = self.matched(prefill)
        weights = self._layer_weights(prefill)
        for piece in prefill.pieces(min(self.block, max(total // 4, 1))):
            entries = sum(prefill.stores[layer.index].entries for layer in layers)
            room = sum(layer.kv_heads for layer in layers) * (total - len(piece))
            if entries > room:
                self._condense(prefill, episode.patched, weights, room, equal)
            prefill.feed(piece)
        return prefill.result(notes=(episode.note,))

    def _room(self, prefill: ChunkedPrefill) -> tuple[int, bool]:
        """How many entries each head may hold on average, and whether all heads of a layer hold as many."""
        total = prefill.entries(2)
        heads = sum(layer.kv_heads for layer in prefill.compressible)
        if self.heads == "equal" or heads == len(prefill.compressible) or total == prefill.tokens:
            return total, True
        lengths = 3 * 2 * INDEX_BYTES * heads  # where each head begins and ends, in keys, values and positions
        try:
            return prefill.entries(2, lambda _: lengths), False
        except BudgetTooSmall:  # there is room for entries only
            return total, True

    def matched(self, prefill: ChunkedPrefill) -> Episode:
        """The episode of the prompt that its question is about."""
        prompt = prefill.prompt
        segments = prompt.ids.split(self.segment)
        words = prompt.ids[-self.segment :] if prefill.question is None else asked(prompt, prefill.question)
        embedded = torch.stack([embedding(prefill.model, ids) for ids in (*segments, words)])
        found = nearest_episode(embedded[:-1], embedded[-1], self.episodes, self.medoids)
        return Episode(
            torch.cat([_instruction(prompt), *(segments[index] for index in found.medoids)]),
            f"EpiCache answers from episode {found.number + 1} of {found.episodes}: {found.members} of {len(segments)} "
            f"segments, represented by number {', '.join(str(index + 1) for index in found.medoids)}",
        )

    def _layer_weights(self, prefill: ChunkedPrefill) -> Tensor:
        """What each compressible layer's room is in proportion to, float64 [l]."""
        layers = prefill.compressible
        alike = {prefill.shape(layer).full_nbytes for layer in layers}
        if self.alpha == 0 or len(alike) > 1:  # entries of unlike layers do not make room for each other
            return torch.ones(len(layers), dtype=torch.float64)
        alike_keys = key_similarity(prefill.model, prefill.ids[:_PROFILED], self.sinks, prefill.progress)
        return layer_weights(torch.stack([alike_keys[layer.index] for layer in layers]).double(), self.alpha)

    def _condense(self, prefill: ChunkedPrefill, patched: Tensor, weights: Tensor, room: int, equal: bool) -> None:
        """Leave `room` entries over all layers and heads."""
        layers = prefill.compressible
        scores = prefill.probe(patched, lambda _, rows: most_attended(rows))
        entries = torch.tensor([prefill.stores[layer.index].entries for layer in layers])
        heads = torch.tensor([layer.kv_heads for layer in layers])
        each = room // int(heads.sum())
        unit = heads if equal else torch.ones_like(heads)
        floor = torch.minimum(entries, heads * max(each // 4, 1))
        counts = layer_counts(each * len(layers) if equal else room, weights, entries // unit, floor // unit) * unit
        for layer, attended, count in zip(layers, scores, counts.tolist(), strict=True):
            positions, valid = prefill.stores[layer.index].slots()
            ranked = with_sinks(attended, positions, self.sinks)
            if valid is not None:
                ranked = ranked.masked_fill(~valid, -1)
            prefill.keep(layer.index, best(ranked, count, equal=equal))


class Episode(NamedTuple):
    """patched: ids [q] of the instruction and its medoid segments, in their order. note: which it is, in words."""

    patched: Tensor
    note: str


def _instruction(prompt: Prompt) -> Tensor:
    """The ids [q] that ask for what matters, with the chat template around them where there is one."""
    if prompt.tokenizer is None:
        return prompt.ids[:0]
    return prompt.question_ids(_WANTED if prompt.chat else f"\n\n{_WANTED}\n", prompt.tokenizer)
