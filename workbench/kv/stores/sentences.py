"""Entries in host memory by sentences, each found by the mean of its keys."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from workbench.kv.stores.format import INDEX_BYTES, Shape
from workbench.kv.stores.offload import Index, Retriever
from workbench.trace import LayerTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MEAN = torch.bfloat16  # a mean only ranks
_MARKS = frozenset((".", "!", "?", ". ", "! ", "? ", "...", "\n\n", "\n\n\n", "。", "！", "？", "。。"))


def closes(token: int, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a sentence ends with this token: it is a mark and nothing else, one of those of the authors' code."""
    return tokenizer is not None and str(tokenizer.decode([token])) in _MARKS


def sentence_ends(ids: Tensor, tokenizer: PreTrainedTokenizerBase | None, longest: int) -> tuple[int, ...]:
    """Where the sentences of ids [n] end (exclusive), none longer than `longest`."""
    closing = {token for token in set(ids.tolist()) if closes(token, tokenizer)}
    ends, begin, count = [], 0, ids.numel()
    for end, token in enumerate(ids.tolist(), start=1):
        if token in closing or end - begin == longest or end == count:
            ends.append(end)
            begin = end
    return tuple(ends)


@dataclass(frozen=True)
class SentenceIndex(Index):
    """The mean key of every sentence, and which sentence each entry is of.

    fetch: tokens that a query fetches; known: how many of the prompt's can be found by each head. opening: how many
    tokens of a sentence fetch all that can be found. ends: where the prompt's sentences end; none is longer than
    `longest`, which is where they end if `tokenizer` is None. weights: by number of layer, how much each position
    matters, [k, n].
    """

    fetch: int
    known: int
    opening: int
    longest: int
    ends: tuple[int, ...] = field(repr=False)
    weights: dict[int, Tensor] = field(compare=False, repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(compare=False, repr=False)

    def nbytes(self, shape: Shape, others: Tensor) -> int:
        sentence = shape.key_width * _MEAN.itemsize + INDEX_BYTES  # with its length
        head = len(self.ends) * sentence + INDEX_BYTES + 4 * shape.key_width  # with its entries and float32 query
        return shape.kv_heads * (len(others) * head + int(others.amax(dim=1).sum()) * INDEX_BYTES)

    def build(self, layer: LayerTrace, others: Tensor) -> Retriever:
        keys, device = layer.keys, others.device
        counts = others.sum(dim=1)
        place = self.weights[layer.index].masked_fill(~others, -torch.inf)
        place = place.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        findable = others & (place < counts.clamp(max=self.known)[:, None])  # [k, n]
        ends = torch.tensor(self.ends, device=device)
        sentence = torch.searchsorted(ends, torch.arange(keys.shape[1], device=device), right=True)  # [n]
        owners = torch.full((len(keys), int(counts.max())), -1, dtype=torch.int32, device=device)
        head, position = others.nonzero(as_tuple=True)
        slot = (others.cumsum(dim=1) - 1)[head, position]
        owners[head, slot] = torch.where(findable[head, position], sentence[position], -1).to(torch.int32)
        made = Sentences(
            keys.new_zeros(len(keys), len(ends), keys.shape[2], dtype=_MEAN),
            owners,
            torch.zeros(len(keys), len(ends), dtype=torch.int32, device=device),
            counts.to(torch.int32),
            torch.zeros(len(keys), keys.shape[2], device=device),
            replace(self, weights={}),
        )
        made.take(keys, sentence.expand(len(keys), -1), findable)
        return made


class Sentences(Retriever):
    """Means [k, s, d] and lengths int32 [k, s] of the sentences, and of each entry the number of its own, int32 [k, m],
    -1 for those that cannot be found.

    counts int32 [k]: entries in host memory. query_sum float32 [k, d]: the sum of the last `read` queries, those of the
    sentence in progress. index: how it was asked for, without weights. A sentence that is being written has the number
    that it will have.
    """

    def __init__(
        self, means: Tensor, owners: Tensor, lengths: Tensor, counts: Tensor, query_sum: Tensor, index: SentenceIndex
    ) -> None:
        self.means, self.owners, self.lengths, self.counts, self.query_sum = means, owners, lengths, counts, query_sum
        self.given = index
        self.ends = list(index.ends)
        self.read = 0
        self.findable = 0  # entries of the head that has most which can be found
        self.coming: list[int] = []  # positions that are read

    def reads(self, ids: Tensor, positions: Tensor) -> None:
        self.coming = positions.tolist()
        for token, position in zip(ids.tolist(), positions.tolist(), strict=True):
            begin = self.ends[-1]
            if position >= begin:
                full = position + 1 - begin >= self.given.longest
                self.ends += [position + 1] if full or closes(token, self.given.tokenizer) else []

    def find_at(self, query: Tensor, positions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        asked, everything = self.in_progress(query, positions)
        likeness = asked @ self.means.float().mT  # [k, q, s]
        rank = likeness.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        slots, sentences = self.owners.shape[1], self.means.shape[1]
        owners = self.owners.long()[:, None].expand(-1, query.shape[1], -1)
        turn = rank.gather(2, owners.clamp_min(0)).masked_fill(owners < 0, sentences)  # [k, q, m]
        # One number for the turn of an entry's sentence and, within it, its own.
        turn = turn * slots + torch.arange(slots, device=turn.device)
        most = [self.findable if whole else min(self.given.fetch, slots) for whole in everything]
        first = turn.topk(max(*most, 1), dim=2, largest=False)
        counts = first.values < sentences * slots
        if len(set(most)) > 1:
            counts &= torch.arange(max(most), device=turn.device) < torch.tensor(most, device=turn.device)[:, None]
        return first.indices, counts

    def in_progress(self, query: Tensor, positions: Tensor) -> tuple[Tensor, list[bool]]:
        """For query [h, q, d] at positions [q] the mean of each KV head's queries so far in its sentence, [k, q, d];
        and which of them fetch everything: those that begin a sentence, and those that end one.
        """
        grouped = query.float().view(self.means.shape[0], -1, *query.shape[1:]).mean(dim=1)
        ends, means, everything = set(self.ends), [], []
        # One that comes alone was told of: the device is not waited for.
        where = self.coming if len(self.coming) == positions.numel() == 1 else positions.tolist()
        for row, position in zip(grouped.unbind(dim=1), where, strict=True):
            self.query_sum, self.read = self.query_sum + row, self.read + 1
            means.append(self.query_sum / self.read)
            if position + 1 in ends:
                self.query_sum, self.read = torch.zeros_like(self.query_sum), 0
            everything.append(self.read <= self.given.opening)
        return torch.stack(means, dim=1), everything

    def add(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        ends = torch.tensor(self.ends, device=keys.device)
        sentence = torch.searchsorted(ends, positions.contiguous(), right=True)  # [k, e]
        more = int(sentence.max()) + 1 - self.means.shape[1]
        if more > 0:
            self.means = torch.cat([self.means, self.means.new_zeros(len(keys), more, keys.shape[2])], dim=1)
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(len(keys), more)], dim=1)
        self.take(keys, sentence, torch.ones_like(sentence, dtype=torch.bool))
        slots = self.counts[:, None] + torch.arange(keys.shape[1], device=keys.device)
        owners = self.owners.new_full((len(keys), int(slots.max()) + 1), -1)
        owners[:, : self.owners.shape[1]] = self.owners
        self.owners = owners.scatter_(1, slots.long(), sentence.to(torch.int32))
        self.counts = self.counts + keys.shape[1]

    def take(self, keys: Tensor, sentence: Tensor, which: Tensor) -> None:
        """Let keys [k, e, d] at which bool [k, e] is True join the means of the sentences int64 [k, e]."""
        self.findable += int(which.sum(dim=1).max())
        lengths = self.lengths.scatter_add(1, sentence, which.to(torch.int32))
        sums = self.means.float() * self.lengths[..., None]
        sums.scatter_add_(1, sentence[..., None].expand_as(keys), keys.float() * which[..., None])
        self.means, self.lengths = (sums / lengths.clamp_min(1)[..., None]).to(_MEAN), lengths

    def tensors(self) -> list[Tensor]:
        return [self.means, self.owners, self.lengths, self.counts, self.query_sum]

    def clone(self) -> Self:
        twin = copy(self)
        twin.means, twin.owners, twin.lengths, twin.counts, twin.query_sum = (x.clone() for x in self.tensors())
        twin.ends = list(self.ends)
        return twin
