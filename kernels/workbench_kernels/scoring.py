"""How an attention layer makes scores of the products of its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Which positions an indexer chose for each query of a pass (sparse attention); no other is seen.

    queries int64 [q]: where the queries stand, ascending. keys int [q, c]: what was chosen for each, in any order, with
    later positions among them where there were too few; None: everything. All heads see the same.
    """

    queries: Tensor
    keys: Tensor | None

    @property
    def most(self) -> int | None:
        """How many keys a query sees at most; None: everything."""
        return None if self.keys is None else self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.keys is None else self.keys.nbytes

    def to(self, device: torch.device) -> Chosen:
        """The same on another device."""
        return Chosen(self.queries, None if self.keys is None else self.keys.to(device))

    def visible(self, query_positions: Tensor, positions: Tensor) -> Tensor | None:
        """Whether positions int [..., m] were chosen for the queries at query_positions int [q]: bool [..., q, m].

        None: everything was. Raises ValueError for queries of another pass.
        """
        if self.keys is None:
            return None
        asked = query_positions.to(self.queries.device)
        rows = torch.searchsorted(self.queries, asked).clamp_max(len(self.queries) - 1)
        if not torch.equal(self.queries[rows], asked):
            raise ValueError("what an indexer chose is known of the queries of its own pass only")
        keys = self.keys[rows.to(self.keys.device)].to(positions.device).long()  # [q, c]
        size = 1 + max(int(x.max()) if x.numel() else 0 for x in (keys, positions))
        table = torch.zeros(len(keys), size, dtype=torch.bool, device=keys.device).scatter_(1, keys, True)
        return table[:, positions.clamp_min(0).long()].movedim(0, -2)


@dataclass(frozen=True, slots=True)
class Scoring:
    """A score is scale * q k, bent to softcap * tanh(score / softcap) if there is a softcap, plus slope * key position
    if there are slopes; rows see a window or their own chunk, and with sinks a share of their weight goes to no key.

    All that attends, on any device, takes these as one value; sinks and slopes exclude one another. Where queries of
    some heads are worked on by themselves, `of` gives what is theirs.
    """

    scale: float
    """what products are multiplied with, most often d ** -0.5"""
    window: int | None = None
    """how many positions a query sees, its own included; None: all up to its own"""
    softcap: float | None = None
    """the bound of scores (Gemma 2); None: unbounded"""
    sinks: Tensor | None = None
    """[h] the score of a key without value that all queries of a head see (GPT-OSS); None: there is none"""
    slopes: Tensor | None = None
    """[h] what is added to a head's scores for each position that a key stands further on (ALiBi); None: nothing"""
    chosen: Chosen | None = None
    """what of all that an indexer chose for each query (DeepSeek-V3.2); None: there is no indexer"""
    rounded: bool = False
    """whether slopes are multiplied with positions, counted from 0, in bfloat16 (Falcon): steps, far from the start"""
    chunk: int | None = None
    """how many positions make a chunk (Llama 4), of which a query sees only its own; None: there are no chunks"""

    def __post_init__(self) -> None:
        if self.sinks is not None and self.slopes is not None:
            raise ValueError(
                "sinks beside slopes (ALiBi): a sink stands nowhere, so how far it is from a query is unknown"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scoring):
            return NotImplemented
        alike = self._numbers == other._numbers and self.chosen is other.chosen
        return alike and _same(self.sinks, other.sinks) and _same(self.slopes, other.slopes)

    def __hash__(self) -> int:
        return hash(self._numbers)

    @property
    def _numbers(self) -> tuple[float, int | None, float | None, bool, int | None]:
        return self.scale, self.window, self.softcap, self.rounded, self.chunk

    @property
    def plain(self) -> bool:
        """Whether scores are products alone, and weights their softmax over a window."""
        return self.sinks is None and self.in_kernels

    @property
    def in_kernels(self) -> bool:
        """Whether kernels that decode can compute it: they know neither slopes, what an indexer chose, nor chunks."""
        return self.slopes is None and self.chosen is None and self.chunk is None

    def of(self, heads: slice | int | Tensor) -> Scoring:
        """The same for some of the query heads."""
        if self.plain:
            return self
        return replace(self, sinks=_picked(self.sinks, heads), slopes=_picked(self.slopes, heads))

    def without_sinks(self) -> Scoring:
        """The same for all parts but one of a softmax that is computed in parts: sinks take part once."""
        return self if self.sinks is None else replace(self, sinks=None)

    def offsets(self, query_positions: Tensor, positions: Tensor) -> Tensor | None:
        """How far keys at positions int [..., m] stand ahead of the last of the queries; None where it is no matter.

        What is the same for all keys of a row cancels in its softmax, so one query serves for all; near it float32
        tells neighbours apart however long the text is. Where products are rounded they stay positions.
        """
        if self.slopes is None or self.rounded:
            return None if self.slopes is None else positions
        return positions - query_positions.max().to(positions.device)

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled scores of any shape, bent by the softcap; themselves where there is none."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def bent(self, scores: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Scaled scores [..., q, m], whose first dimensions are the heads (or KV heads and groups), capped and biased.

        offsets: see `offsets`, broadcastable to the scores; wanted where there are slopes.
        """
        scores = self.cap(scores)
        if self.slopes is None:
            return scores
        if offsets is None:
            raise ValueError("scores with slopes (ALiBi) are made from the positions of keys too: give offsets")
        return scores + self.biases(scores, offsets)

    def biases(self, scores: Tensor, offsets: Tensor) -> Tensor:
        """What slopes add to scores [..., q, m], broadcastable to them; offsets as for `bent`."""
        assert self.slopes is not None
        slopes = by_head(self.slopes, scores)
        if self.rounded:
            return (slopes.bfloat16() * offsets.bfloat16()).to(scores.dtype)
        return slopes * offsets

    def scores(self, products: Tensor, visible: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """Scores of products q k [..., q, m], float32 or wider, which are overwritten: scaled, capped, biased and
        masked.

        visible: bool, broadcastable to [..., q, m]; minus infinity stands where it is False. None: everything is seen.
        offsets: as for `bent`.
        """
        scores = self.bent(products.mul_(self.scale), offsets)
        return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)

    def visible(self, query_positions: Tensor, positions: Tensor) -> Tensor:
        """Whether queries at query_positions int [q] see keys at positions int [..., m]: bool [..., q, m]."""
        keys, queries = positions[..., None, :], query_positions[:, None]
        seen, begin = keys <= queries, self.begin(queries)
        if begin is not None:
            seen = seen & (keys >= begin)
        chosen = None if self.chosen is None else self.chosen.visible(query_positions, positions)
        return seen if chosen is None else seen & chosen

    def begin(self, query_positions: Tensor) -> Tensor | None:
        """The first position that queries at these positions see, or one before the text; None: they see all of it."""
        if self.window is None and self.chunk is None:
            return None
        begins = query_positions - (query_positions + 1 if self.window is None else self.window - 1)
        return begins if self.chunk is None else begins.maximum(query_positions - query_positions % self.chunk)


def by_head(numbers: Tensor, scores: Tensor) -> Tensor:
    """One number for each head, [h], laid beside scores [..., q, m], whose first dimensions are the heads."""
    return numbers.to(scores.device, scores.dtype).view(*scores.shape[:-2], 1, 1)


def with_sinks(out: Tensor, lse: Tensor, scoring: Scoring, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The state of outputs [h, q, dv] and log-sum-exps [h, q] with the sinks as one key more, whose value is 0; the
    output as `dtype`.
    """
    if scoring.sinks is None:
        return out.to(dtype), lse
    whole = torch.logaddexp(lse, scoring.sinks.to(lse.device, lse.dtype)[:, None])
    return (out * torch.exp(lse - whole)[..., None]).to(dtype), whole


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.device == other.device and torch.equal(one, other))


def _picked(numbers: Tensor | None, heads: slice | int | Tensor) -> Tensor | None:
    return None if numbers is None else numbers[heads].reshape(-1)
