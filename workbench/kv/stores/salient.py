"""Two tiers, both quantised: more bits for salient tokens than for the others, also for those that come later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Part, Place
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.format import Format, Shape, index_nbytes
from workbench.kv.stores.frozen import ChannelRows, FrozenStore, bitmap_nbytes
from workbench.kv.stores.packed import PackedRows
from workbench.kv.stores.parts import here, states_of
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench.trace import LayerTrace
from workbench_kernels import Scoring
from workbench_kernels.received import add_received
from workbench_kernels.rows import Ragged

_HALF = 2  # scales, zeros and channel factors are float16


@dataclass(frozen=True)
class SalientFormat(Format):
    """Selected entries at `high` bits, all others at `low`; tokens that come while decoding at `dtype`, until there are
    `gap` of them and all is quantised anew (see `SalientStore`); 0: for good.

    Within a tier the keys of a head have a scale and zero for each channel; values have them for each token, after
    each channel was divided by the root of its largest magnitude (channel-separable token-wise).
    """

    dtype: torch.dtype
    high: int
    low: int
    gap: int = 0

    @property
    def attends_itself(self) -> bool:  # type: ignore[override]
        return bool(self.gap)

    @property
    def tiers(self) -> tuple[str, ...]:  # type: ignore[override]
        return (f"{self.high}-bit", f"{self.low}-bit")

    def nbytes(self, shape: Shape, selected: Tensor) -> int:
        return self._tier(shape, selected, self.high) + self._tier(shape, shape.tokens - selected, self.low)

    def _tier(self, shape: Shape, counts: Tensor, bits: int) -> int:
        counts = counts[(counts > 0).any(dim=1)]  # a tier that is empty in a layer has no tensors there
        entries, heads = int(counts.sum()), counts.numel()
        keys = entries * -(-shape.key_width * bits // 8) + heads * 2 * _HALF * shape.key_width
        values = entries * (-(-shape.value_width * bits // 8) + 2 * _HALF) + heads * _HALF * shape.value_width
        return keys + values + 4 * index_nbytes(counts) + bitmap_nbytes(counts, shape.tokens)

    def build(self, layer: LayerTrace, tiers: Tensor, state: Tensor | None) -> Store:
        nothing = torch.zeros_like(tiers, dtype=torch.bool)
        tail = DenseStore.where(layer.keys, layer.values, nothing, self.dtype)
        settled = quantised_tiers(layer.keys, layer.values, tiers == 1, self.high, self.low)
        if not self.gap:
            return SplitStore((tail, *settled))
        return SalientStore(tail, settled, self, share=float((tiers == 1).float().mean()))


class SalientStore(SplitStore):
    """New tokens in an exact tail; when there are `gap` of them, all that is held is quantised anew together with them.

    Of each `gap` tokens so many are salient as were of the prompt, in each head those to which the query of the pass
    gave most. What was quantised before is read, and rounded again by scales that hold for all.
    """

    moves_by_attention = True

    def __init__(self, tail: DenseStore, settled: tuple[FrozenStore, ...], form: SalientFormat, share: float) -> None:
        """share: of tokens that are salient."""
        super().__init__((tail, *settled))
        self.tail, self.settled, self.form, self.share = tail, settled, form, share
        self._for_others = False

    def keep_for_others(self) -> None:
        self._for_others = True

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self._received, received = None, self._received
        if received is not None:
            self._settle(received)
        super().append(keys, values, positions)

    def reserve(self, tokens: int) -> None:
        self.tail.reserve(min(tokens, 2 * self.form.gap))

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        count = self.tail.longest
        full = count >= self.form.gap
        out, probs = super().attend(query, query_positions, scoring, weights=weights or full)
        if full:
            assert probs is not None
            self._received = probs[:, :, -1, :count].sum(dim=1)  # [k, t]
            if not self._for_others:
                received, self._received = self._received, None
                self._settle(received)
        return out, probs if weights else None

    # -- captured decode steps: the newest query stays on the device until the tail is full

    _asked: Tensor | None = None  # the query [h, 1, d] of the last captured step
    _scoring: Scoring | None = None

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        tail = self.tail.growing_part(keys, values, steps, pin)

        def newest(query: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
            if steps:
                if self._asked is None:
                    self._asked = torch.empty_like(query)
                self._asked.copy_(query)
                self._scoring = scoring
            return tail(query, scoring)

        joining = zip(self.settled, self._joining(steps), strict=True)
        return [newest, *(part.part(keys.data.dtype, more, pin) for part, more in joining)]

    def _joining(self, steps: int) -> list[int]:
        """How many entries of each head join each settled part while so many tokens come."""
        gap = self.form.gap
        times, salient = (self.tail.longest + steps) // gap if steps else 0, salient_count(self.share, gap)
        return [times * (salient if self._upper(part) else gap - salient) for part in self.settled]

    def _upper(self, part: FrozenStore) -> bool:
        return part.keys.bits == self.form.high

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        joining = zip(self.settled, self._joining(steps), strict=True)
        return super().room_for(steps) + [room for part, more in joining for room in part.room_for(more)]

    @property
    def period(self) -> int:
        return self.form.gap

    @property
    def steps_until_settled(self) -> int:
        return max(self.form.gap - self.tail.longest, 1)

    def most_rows(self, steps: int) -> tuple[int, int]:
        most = max(self.form.gap, self.tail.longest + 1)
        return most, most

    def settle(self) -> None:
        """Quantise the tail and all else anew, in place, by the attention of the newest query."""
        query, scoring, keys = self._asked, self._scoring, self.tail.keys
        assert query is not None
        assert scoring is not None
        parts = super().attentions(keys.ragged(), self.tail.values.ragged(), 0, here)
        lse = torch.stack([lse for _, lse in states_of(parts, query, scoring)]).logsumexp(dim=0)
        received = Ragged.of(torch.zeros(self.kv_heads, keys.longest, 1, device=query.device))
        add_received(query, keys.ragged(), lse, received, scoring)
        before = self.settled
        self._settle(received.data.view(self.kv_heads, -1))
        for part, fresh in zip(before, self.settled, strict=True):
            part.refill(fresh)
        self.settled = before
        self.parts = (self.tail, *before)

    _received: Tensor | None = None  # what the tail's tokens got from the query of the pass, until they are settled

    def _settle(self, received: Tensor) -> None:
        """Quantise the tail's whole stretches of `gap` tokens, by the attention that each token received [k, t]."""
        gap, count = self.form.gap, received.shape[1] // self.form.gap * self.form.gap
        new = salient_of(received[:, :count].unflatten(1, (-1, gap)), self.share).flatten(1)
        keys, values, high = self._in_order()
        for rows in self.tail.placed:
            rows.cut_front(count)
        keys = torch.cat([keys, self.tail.keys.cut_front(count).float()], dim=1)
        values = torch.cat([values, self.tail.values.cut_front(count).float()], dim=1)
        self.settled = quantised_tiers(keys, values, torch.cat([high, new], dim=1), self.form.high, self.form.low)
        self.parts = (self.tail, *self.settled)

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [k, n, d] and values of all that is quantised, by position, and which are in the upper tier [k, n]."""
        held = SplitStore(self.settled).contents(torch.float32)
        where = held.positions.expand(len(held.keys), -1)
        first = self.settled[0]
        longest = first.keys.codes.longest if self._upper(first) else 0
        high = torch.arange(where.shape[1], device=where.device) < longest
        if held.valid is not None:
            where = where.masked_fill(~held.valid, torch.iinfo(where.dtype).max)
        entries = int(self.settled_entries)
        order = where.argsort(dim=1, stable=True)[:, :entries]
        keys, values = (x.gather(1, order[..., None].expand(-1, -1, x.shape[2])) for x in (held.keys, held.values))
        return keys, values, high.expand_as(where).gather(1, order)

    @property
    def settled_entries(self) -> int:
        """How many entries each head has that are quantised: all positions so far."""
        return sum(part.entries for part in self.settled) // self.kv_heads

    def clone(self) -> Self:
        twin = type(self)(self.tail.clone(), tuple(part.clone() for part in self.settled), self.form, self.share)
        twin._for_others, twin._received = self._for_others, self._received  # noqa: SLF001  (its own kind)
        return twin


def quantised_tiers(keys: Tensor, values: Tensor, high: Tensor, bits: int, low: int) -> tuple[FrozenStore, ...]:
    """Keys [k, n, d] and values [k, n, dv]: at `bits` bits where high [k, n] is True, elsewhere at `low`."""
    made = []
    for keep, width in ((high, bits), (~high, low)):
        if not bool(keep.any()):
            continue
        lengths, x = keep.sum(dim=1), values.float()
        rows = PackedRows.of(x[keep], lengths, width, x.shape[-1], "token", channel_factors(x, keep))
        made.append(FrozenStore.where(ChannelRows.of(keys.float()[keep], lengths, width), rows, keep))
    return tuple(made)


def salient_of(received: Tensor, share: float) -> Tensor:
    """Which of each stretch's tokens are salient, by what each received [k, s, t]: a share of t, bool [k, s, t]."""
    count = salient_count(share, received.shape[-1])
    best = received.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(received, dtype=torch.bool).scatter_(-1, best, True)


def salient_count(share: float, tokens: int) -> int:
    """How many of so many tokens are salient."""
    return int(share * tokens + 0.5)


def channel_factors(values: Tensor, keep: Tensor) -> Tensor:
    """1 / sqrt(max |value|) of each channel over the values [k, n, d] at which keep [k, n] is True, float16 [k, d]."""
    largest = values.float().abs().mul(keep[..., None]).amax(dim=1)
    return torch.where(largest > 0, largest.rsqrt(), 1.0).clamp(2.0**-14, 2.0**14).to(torch.float16)
