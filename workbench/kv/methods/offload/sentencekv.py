"""SentenceKV: what lies in host memory is found sentence by sentence, by the mean of each one's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from workbench.kv.base import Study
from workbench.kv.sinks_and_recent import SinksAndRecent
from workbench.kv.stores.format import INDEX_BYTES, Shape
from workbench.kv.stores.offload import Index, Retriever
from workbench.registry import Paper, param, register
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEAN = torch.bfloat16  # a mean only ranks
_KERNEL = 7  # of the pooling by which a sentence's tokens are weighed, as published
_MARKS = tuple(".!?…。！？")
_QUOTES = " \n\t\"')]”’»"


@register
class SentenceKV(SinksAndRecent):
    """Keep first and recent tokens on the device, and fetch the sentences whose mean key is most like the query.

    The prompt is cut into sentences where a token ends in a full stop, an exclamation or question mark or leaves a line
    blank. Each is represented for every KV head by the mean of its keys, on the device; its entries lie in host memory.
    While decoding, the mean query of the sentence in progress is compared with all means, and the best sentences are
    fetched until there are `fetch` tokens. Of the prompt only the `factor` times as many tokens can be found that its
    last `window` queries attend to most, max-pooled over 7 neighbours (the authors' code keeps no others at all; here
    they lie in host memory too, so that every plan names where each token is). Means are of those that can be found.

    Chosen here: KV heads instead of query heads, for which the queries of a group are averaged; dot products, as in the
    authors' code; a sentence ends after `longest` tokens at the latest, and everything is cut so where there is no
    tokenizer, while decoding too, where what moves out and the sentence in progress are counted by tokens.
    """

    key = "sentencekv"
    title = "SentenceKV"
    paper = Paper(
        "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching", "Zhu et al. 2025", "2504.00970"
    )
    claim = "finds a needle as reliably as the full cache, at a latency that does not grow with the text"
    default_budget = 0.25

    fetch: int = param(256, ge=1, le=65536, unit="tokens", help="how many each query fetches from host memory")
    factor: float = param(3.0, ge=1.0, le=1024.0, help="how many times as many of the prompt's tokens can be found")
    window: int = param(32, ge=1, le=1024, unit="tokens", help="queries at the end of the prompt that choose those")
    longest: int = param(64, ge=1, le=1024, unit="tokens", help="where a sentence ends at the latest")

    def retrieve(self, study: Study, shapes: Sequence[Shape]) -> Index:
        trace = study.trace

        def compute() -> dict[int, Tensor]:
            track = study.progress.track(trace.compressible, "weighing tokens", len(trace.compressible))
            return {layer.index: votes(layer, self.window) for layer in track}

        ends = trace.once(
            ("sentences", self.longest), lambda: sentence_ends(trace.ids, trace.prompt.tokenizer, self.longest)
        )
        weights = trace.once(("sentencekv", self.window), compute)
        return SentenceIndex(self.fetch, max(int(self.factor * self.fetch), 1), self.longest, ends, weights)


def sentence_ends(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None, longest: int) -> tuple[int, ...]:
    """Where the sentences of ids [n] end (exclusive), none longer than `longest`."""
    closing: set[int] = set()
    if tokenizer is not None:
        closing = {token for token in set(ids.tolist()) if _closes(str(tokenizer.decode([token])))}
    ends, begin, count = [], 0, ids.numel()
    for end, token in enumerate(ids.tolist(), start=1):
        if token in closing or end - begin == longest or end == count:
            ends.append(end)
            begin = end
    return tuple(ends)


def _closes(text: str) -> bool:
    """Whether a sentence ends with this token."""
    return text.count("\n") > 1 or text.rstrip(_QUOTES).endswith(_MARKS)


def votes(layer: LayerTrace, window: int) -> Tensor:
    """The attention of the last `window` queries to each position, summed, pooled, averaged by KV head: [k, n]."""
    received = layer.attention(window).mean(dim=1).sum(dim=1)
    return max_pool1d(received, _KERNEL, stride=1, padding=_KERNEL // 2)


@dataclass(frozen=True)
class SentenceIndex(Index):
    """The mean key of every sentence, and which entries are its own.

    fetch: tokens that a query fetches; known: how many of the prompt's can be found by each head. ends: where the
    prompt's sentences end; a new one is `longest` tokens long. weights: by number of layer, how much each position
    matters, [k, n].
    """

    fetch: int
    known: int
    longest: int
    ends: tuple[int, ...] = field(repr=False)
    weights: dict[int, Tensor] = field(compare=False, repr=False)

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        sentence = shape.key_width * _MEAN.itemsize + INDEX_BYTES
        head = len(self.ends) * sentence + INDEX_BYTES + 4 * shape.key_width  # with its length and float32 query
        members = others.clamp(max=self.known).amax(dim=1)
        return shape.kv_heads * (len(others) * head + int(members.sum()) * INDEX_BYTES)

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        keys, device = layer.keys, others.device
        counts = others.sum(dim=1)
        place = self.weights[layer.index].masked_fill(~others, -torch.inf)
        place = place.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        findable = others & (place < counts.clamp(max=self.known)[:, None])  # [k, n]
        ends = torch.tensor(self.ends, device=device)
        owner = torch.searchsorted(ends, torch.arange(keys.shape[1], device=device), right=True)  # [n]
        lengths = torch.zeros(len(keys), len(ends), dtype=torch.long, device=device)
        lengths.index_add_(1, owner, findable.long())
        sums = torch.zeros(len(keys), len(ends), keys.shape[2], device=device)
        sums.index_add_(1, owner, keys.float() * findable[..., None])
        members = (~findable).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(findable.sum(dim=1).max())]
        slots = (others.cumsum(dim=1) - 1).clamp_min(0).gather(1, members)
        return Sentences(
            (sums / lengths.clamp_min(1)[..., None]).to(_MEAN),
            slots.to(torch.int32),
            lengths.cumsum(dim=1).to(torch.int32),
            counts.to(torch.int32),
            torch.zeros(len(keys), keys.shape[2], device=device),
            self.fetch,
            self.longest,
        )


class Sentences(Retriever):
    """Means [k, s, d], the slots int32 [k, c] of their entries one sentence after another, and where among these each
    ends, int32 [k, s].

    counts int32 [k]: entries in host memory. query_sum float32 [k, d]: the sum of the last `read` queries, those of the
    sentence in progress.
    """

    def __init__(
        self,
        means: Tensor,
        members: Tensor,
        ends: Tensor,
        counts: Tensor,
        query_sum: Tensor,
        fetch: int,
        longest: int,
        read: int = 0,
    ) -> None:
        self.means, self.members, self.ends, self.counts, self.query_sum = means, members, ends, counts, query_sum
        self.fetch, self.longest, self.read = fetch, longest, read

    def find(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        likeness = self._in_progress(query) @ self.means.float().transpose(1, 2)  # [k, q, s]
        order = likeness.argsort(dim=2, descending=True, stable=True)
        ends = self.ends.long()
        lengths = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))  # [k, s]
        sorted_lengths = lengths[:, None].expand_as(order).gather(2, order)
        # How many entries of better sentences come before each sentence's own.
        before = torch.empty_like(order).scatter_(2, order, sorted_lengths.cumsum(dim=2) - sorted_lengths)
        steps = torch.arange(self.members.shape[1], device=ends.device).expand(len(ends), -1).contiguous()
        owner = torch.searchsorted(ends, steps, right=True).clamp_max_(ends.shape[1] - 1)  # [k, c]
        place = before.gather(2, owner[:, None].expand(-1, query.shape[1], -1))
        place = place + (steps - (ends - lengths).gather(1, owner))[:, None]  # [k, q, c]
        nowhere = steps.shape[1] + 1
        place = place.masked_fill((steps >= ends[:, -1:])[:, None], nowhere)
        best = place.topk(min(self.fetch, steps.shape[1]), dim=2, largest=False)
        slots = self.members.long()[:, None].expand_as(place).gather(2, best.indices)
        return slots, best.values < nowhere

    def _in_progress(self, query: Tensor) -> Tensor:
        """For query [h, q, d] the mean of each KV head's queries so far in its sentence, [k, q, d]."""
        kv_heads = self.means.shape[0]
        grouped = query.float().view(kv_heads, -1, *query.shape[1:]).mean(dim=1)
        rows = []
        for row in grouped.unbind(dim=1):
            if self.read == self.longest:
                self.query_sum, self.read = torch.zeros_like(self.query_sum), 0
            self.query_sum, self.read = self.query_sum + row, self.read + 1
            rows.append(self.query_sum / self.read)
        return torch.stack(rows, dim=1)

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        kv_heads, new, _ = keys.shape
        parts = keys.float().split(self.longest, dim=1)
        self.means = torch.cat([self.means, *(part.mean(dim=1, keepdim=True).to(_MEAN) for part in parts)], dim=1)
        last, steps = self.ends[:, -1:], torch.arange(new, device=keys.device)
        members = self.members.new_zeros(kv_heads, int(last.max()) + new)
        members[:, : self.members.shape[1]] = self.members
        members.scatter_(1, (last + steps).long(), (self.counts[:, None] + steps).to(torch.int32))
        lengths = torch.tensor([part.shape[1] for part in parts], dtype=torch.int32, device=keys.device)
        self.members = members
        self.ends = torch.cat([self.ends, last + lengths.cumsum(0, dtype=torch.int32)], dim=1)
        self.counts = self.counts + new

    def tensors(self) -> list[Tensor]:
        return [self.means, self.members, self.ends, self.counts, self.query_sum]

    def clone(self) -> Sentences:
        means, members, ends, counts, query_sum = (tensor.clone() for tensor in self.tensors())
        return Sentences(means, members, ends, counts, query_sum, self.fetch, self.longest, self.read)
