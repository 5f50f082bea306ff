"""Mixed precision that stays mixed while decoding: important entries exact, all others at few bits."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from workbench.kv.stores.capabilities import Capturable, CapturedAttention, Part, Place
from workbench.kv.stores.dense import DenseStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.parts import states_of
from workbench.kv.stores.rows import Rows
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Store
from workbench_kernels import Scoring
from workbench_kernels.received import add_received
from workbench_kernels.rows import Ragged
from workbench_kernels.softmax import merge_states

_BLOCK = 32  # tokens after which captured steps demote
_ROWS_BYTES = 1 << 25  # attention rows held at once


class MixedStore(SplitStore):
    """An exact part that new tokens enter and a low one that takes what leaves it, so that their shares stay.

    The exact part remembers the attention that each of its entries received, and adds to it at every pass. Of t new
    tokens it may grow by share * t; beyond that its entries with the least attention are quantised after the pass, in
    each head its own, but never the newest `recent` part of them. All heads demote equally many, by the share of the
    whole layer, also where one began with more exact entries than another.
    """

    moves_by_attention = True

    def __init__(self, high: DenseStore, low: PackedStore, *, share: float, recent: float, entered: int = 0) -> None:
        """entered: how many tokens have come since the store was built."""
        super().__init__((high, low))
        self.high, self.low = high, low
        self.share, self.recent, self.entered = share, recent, entered
        self._begun = high.longest - self._allowed(entered)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        super().append(keys, values, positions)
        self.entered += keys.shape[1]

    def reserve(self, tokens: int) -> None:
        grown = self._allowed(self.entered + tokens) - self._allowed(self.entered)
        self.high.reserve(grown + 1)  # a token enters before another leaves
        self.low.reserve_taken(tokens - grown)

    def attend(
        self, query: Tensor, query_positions: Tensor, scoring: Scoring, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        out = None if weights else self.by_kernel(query, query_positions, scoring)
        if out is not None:
            self._demote(self._surplus)
            return out, None
        slots, exact = self.high.longest + self.low.keys.codes.longest, self.high.longest
        received = torch.zeros(self.high.keys.heads, exact, device=query.device)
        block = max(1, _ROWS_BYTES // (4 * query.shape[0] * slots))
        outs, rows = [], []
        for part, at in zip(query.split(block, dim=1), query_positions.split(block), strict=True):
            out, probs = Store.attend(self, part, at, scoring, weights=True)
            assert probs is not None
            received += probs[..., :exact].sum(dim=(1, 2))
            outs.append(out)
            if weights:
                rows.append(probs)
        before = self.high.eviction_state
        assert before is not None
        self.high.replace_state(before + received)
        self._demote(self._surplus)
        return torch.cat(outs, dim=1), torch.cat(rows, dim=2) if weights else None

    @property
    def _surplus(self) -> int:
        """How many more exact entries each head has than it may."""
        return self.high.longest - self._begun - self._allowed(self.entered)

    # -- attention in place. In captured steps queries wait beside the log-sum-exps of their scores, so that what was
    # read and not yielded adds nothing to the sums of attention; entries are demoted between replays.

    def by_kernel(self, query: Tensor, query_positions: Tensor, scoring: Scoring) -> Tensor | None:
        return None if query.shape[1] > 1 else super().by_kernel(query, query_positions, scoring)

    @property
    def capturable(self) -> Capturable | None:
        return self

    @property
    def growing(self) -> tuple[Rows, Rows]:
        return self.high.growing

    def attentions(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> list[Part]:
        low = self.low.part(keys.data.dtype, self._demoted(steps), pin)
        return [self.high.growing_part(keys, values, steps, pin), low]

    def _demoted(self, steps: int) -> int:
        """How many entries of each head will have been demoted after so many tokens, at most."""
        if not steps:
            return 0
        grown = self._allowed(self.entered + steps) - self._allowed(self.entered)
        return max(self._surplus, 0) + steps - grown

    def attended_in_parts(self, keys: Ragged, values: Ragged, steps: int, pin: Place) -> CapturedAttention:
        parts = self.attentions(keys, values, steps, pin)
        assert self.high.state is not None
        state, before = self.high.state, keys.lengths[:1].clone()
        waiting = _Waiting(before, min(steps, _BLOCK)) if steps else None
        self._waiting = waiting

        def attend(query: Tensor, scoring: Scoring) -> Tensor:
            states = states_of(parts, query, scoring)
            lse = torch.logaddexp(states[0][1], states[1][1])
            if waiting is None:
                add_received(query, keys, lse, state.ragged(), scoring)
            else:
                waiting.take(query, lse, keys.lengths[:1], scoring)
            return merge_states(states)

        return attend

    _waiting: _Waiting | None = None

    def room_for(self, steps: int) -> list[tuple[Rows, int]]:
        assert self.high.state is not None
        rows = (*self.high.growing, *self.high.placed, self.high.state)
        joining = self._demoted(steps)
        sides = [*self.low.keys.growing(joining), *self.low.values.growing(joining)]
        return [(one, steps) for one in rows] + sides + [(where, joining) for where in self.low.placed]

    @property
    def period(self) -> int:
        return _BLOCK

    @property
    def steps_until_settled(self) -> int:
        return max(_BLOCK - max(self._surplus, 0), 1)

    def most_rows(self, steps: int) -> tuple[int, int]:
        return self.high.longest + steps, self.high.longest + steps

    def advance(self, positions: Tensor) -> None:
        keys, state = self.high.keys, self.high.state
        assert self._waiting is not None
        assert state is not None
        before = keys.longest
        self.high.advance(positions)
        state.append(torch.zeros(self.kv_heads, positions.numel(), 1, device=self.device))
        self.entered += positions.numel()
        self._waiting.add_to(state, keys, before, positions.numel())

    def settle(self) -> None:
        """Demote what the exact part has too much, and let queries wait from here on."""
        self._demote(self._surplus)
        if self._waiting is not None:
            self._waiting.before.copy_(self.high.keys.ragged().lengths[:1])

    def _allowed(self, entered: int) -> int:
        """By how many entries of each head the exact part may have grown after so many tokens."""
        return int(self.share * entered + 1e-6)

    def _demote(self, count: int) -> None:
        if count <= 0:
            return
        received, positions = self.high.eviction_state, self.high.slot_positions
        assert received is not None
        valid = self.high.keys.valid()
        if valid is not None:  # slots beyond a head's length hold nothing
            received, positions = received.masked_fill(~valid, torch.inf), positions.masked_fill(~valid, -1)
        slots = weakest(received, positions, count, self.recent)
        self.low.take(self.high.keys.at(slots), self.high.values.at(slots), positions.gather(1, slots))
        self.high.evict(slots)

    def clone(self) -> Self:
        high, low = self.high.clone(), self.low.clone()
        return type(self)(high, low, share=self.share, recent=self.recent, entered=self.entered)


def weakest(received: Tensor, positions: Tensor, count: int, recent: float) -> Tensor:
    """The slots [k, count] with the least attention, the newest `recent` part of each head's entries set aside.

    received float32 [k, m], inf in slots that hold nothing, and positions int [k, m], -1 there. Fewer are set aside
    where that many would not be left.
    """
    counts = (positions >= 0).sum(dim=1)  # [k]
    safe = torch.minimum((recent * counts + 1e-6).long(), counts - count)
    oldest = positions.sort(dim=1, descending=True).values.gather(1, (safe - 1).clamp_min(0)[:, None])
    aside = (positions >= oldest) & (positions >= 0) & (safe > 0)[:, None]
    return received.masked_fill(aside, torch.finfo(torch.float32).max).topk(count, dim=1, largest=False).indices


class _Waiting:
    """Queries of captured steps whose attention has not been added up, on the device: each finds its place by how many
    rows there are.
    """

    def __init__(self, before: Tensor, steps: int) -> None:
        """before: rows of the first head when the next query comes, less that of its own token, int32 [1]."""
        self.before, self.steps = before, steps
        self._queries: Tensor | None = None
        self._sums: Tensor | None = None
        self._scoring: Scoring | None = None

    def take(self, query: Tensor, lse: Tensor, rows: Tensor, scoring: Scoring) -> None:
        """Keep query [h, 1, d] with its lse [h, 1]; rows int32 [1]: of the first head now."""
        if self._queries is None or self._sums is None:
            self._queries = query.new_zeros(self.steps, *query.shape)
            self._sums = lse.new_zeros(self.steps, *lse.shape)
        place = (rows - self.before - 1).long()
        self._queries.index_copy_(0, place, query[None])
        self._sums.index_copy_(0, place, lse[None])
        self._scoring = scoring

    def add_to(self, state: Rows, keys: Rows, before: int, count: int) -> None:
        """Add the weights of the first `count` queries, of which each sees its own token and those before it."""
        assert self._queries is not None
        assert self._sums is not None
        assert self._scoring is not None
        held, into = keys.ragged(), state.ragged()
        for step in range(count):
            rows = held._replace(lengths=held.lengths - (count - 1 - step), longest=before + step + 1)
            add_received(self._queries[step], rows, self._sums[step], into, self._scoring)
